"""Loading only the weights of a checkpoint, in whichever format it is, into a model of this run's layout."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from megatron.sft.checkpoint.folder import MANIFEST, TORCH_DIST, Checkpoint
from megatron.sft.checkpoint.piece_reader import PieceReader
from megatron.sft.checkpoint.pieces import model_tensors, piece_of
from megatron.sft.checkpoint.stored_tensors import StoredParameters, stored_parameters
from megatron.sft.checkpoint.torch_format import EMBEDDING, OUTPUT, padded
from megatron.sft.families.registry import read_architecture
from megatron.sft.families.rules import tensor_parallel_part
from megatron.sft.families.weight_names import checkpoint_name, weight_entries
from megatron.sft.model.layout import Layout
from megatron.sft.runtime.errors import UserError


def load_weights(checkpoint: Checkpoint, chunks: Sequence[nn.Module], layout: Layout) -> None:
    """Fill the parameters of this process's model chunks from a checkpoint of either format and of any layout."""
    if checkpoint.format == TORCH_DIST:
        PieceReader(checkpoint.path).fill([piece_of(tensor) for tensor in model_tensors(chunks)])
        return
    config = checkpoint.manifest.get("source", {}).get("config")
    if config is None:
        raise UserError(
            f"{checkpoint.path} has no {MANIFEST} with the model's configuration: run scripts/2_convert.sh on it"
        )
    source = stored_parameters(checkpoint, read_architecture(config, str(checkpoint.path / MANIFEST)))
    for chunk in chunks:
        _fill_part(chunk, source, layout)


def _fill_part(model: Any, source: StoredParameters, layout: Layout) -> None:
    architecture = source.architecture
    entries = {entry.megatron: entry for entry in weight_entries(architecture)}
    experts = architecture.moe.num_experts // layout.expert_parallel if architecture.moe else 0
    first_layer = model.decoder.layers[0].layer_number - 1
    first_expert = experts * parallel_state.get_expert_model_parallel_rank()
    for live_name, parameter in model.named_parameters():
        name = checkpoint_name(live_name, first_layer, first_expert, architecture.moe is not None)
        # The last stage's copy of a tied embedding.
        name = EMBEDDING if name == OUTPUT and architecture.tied_embeddings else name
        whole = source.read(entries[name])
        if name in (EMBEDDING, OUTPUT):
            whole = padded(whole, layout.padded_vocab_size(architecture))
        rank, size = parallel_state.get_tensor_model_parallel_rank(), layout.tensor_parallel
        if entries[name].expert is not None:
            rank, size = parallel_state.get_expert_tensor_parallel_rank(), layout.expert_tensor_parallel
        with torch.no_grad():
            parameter.copy_(tensor_parallel_part(entries[name].rule, whole, rank, size))
