"""Builds the model: the one place that knows megatron-core's GPTModel and how its layers are put together here."""

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.rope import inverse_frequencies
from megatron.sft.families.trained import Trained
from megatron.sft.model.cross_entropy import LogitShape, weighted_cross_entropy
from megatron.sft.model.inputs import MicroBatch, PackedRows
from megatron.sft.model.layer_specs import stage_layers
from megatron.sft.model.layout import Layout
from megatron.sft.model.lora.adapters import add_adapters, freeze
from megatron.sft.model.recomputation import recomputed_whole
from megatron.sft.model.rotary import rotary_tables, with_query_tables
from megatron.sft.runtime import device

# The summed loss whose gradient is taken, every trained token's -log p, and the report of `MicroBatch.weigh` if there is one.
HeadResult = tuple[Tensor, Tensor, Tensor | None]


class OutputHead(tensor_parallel.ColumnParallelLinear):
    """The output layer, computing the loss instead of all logits.

    It stays a separate module because megatron-core waits for a module's gathered parameters when the module is called.
    """

    def forward(
        self, hidden: Tensor, weight: Tensor, batch: MicroBatch, architecture: Architecture, logits: bool
    ) -> Tensor | HeadResult:
        """hidden: [t / TP with sequence parallelism, 1, hidden size]. Returns what `SFTModel.forward` does."""
        if self.sequence_parallel:
            # Each rank's head gives a part of the gradient; the gather's backward sums the parts and scatters.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.squeeze(1)  # [t, hidden]
        shape = LogitShape(architecture.logit_scale, architecture.logit_cap)
        if logits:
            local = shape.of(hidden @ weight.t())
            whole: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.tp_group)
            return whole[:, : architecture.vocab_size]
        trained = hidden.index_select(0, batch.targets.hidden_indices)  # [n, hidden]
        shared_here = self.weight is None  # tied, and the embedding lies on this stage
        # What the backward pass will start with: the weight's gradient is made before.
        scale = batch.gradient_scale
        if self.config.fp16 and torch.is_grad_enabled():
            scale = self.config.grad_scale_func(torch.ones((), device=hidden.device) if scale is None else scale)
        targets, report, rows = batch.targets, None, architecture.vocab_size
        if batch.weigh is not None:
            with torch.no_grad():
                weighted, losses = weighted_cross_entropy(trained, weight, targets, rows, self.tp_group, shape=shape)
            weights, report = batch.weigh(losses)
            if not torch.is_grad_enabled():
                return weighted, losses, report
            targets = replace(targets, weights=weights)
        result = weighted_cross_entropy(trained, weight, targets, rows, self.tp_group, shared_here, scale, shape)
        return *result, report


class SFTModel(GPTModel):
    """A GPTModel that takes a `MicroBatch` and returns the summed loss of its trained tokens (on the last stage)."""

    def __init__(self, *args: Any, architecture: Architecture, **kwargs: Any) -> None:
        # megatron-core's own rotary positions know Llama 3.1's scaling at its first values only.
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.architecture = architecture
        # No buffers: Float16Module would round them. None where they depend on the lengths of conversations.
        self.inverse_frequencies = [
            None if rope.scaling and rope.scaling.by_length else inverse_frequencies(rope, device.current())
            for rope in architecture.ropes
        ]
        # Set where recomputation, or a stage that trains nothing, needs a gradient of what a frozen embedding gives.
        self.starts_gradient = False
        if self.post_process:
            # GPTModel makes its output layer itself; only what it computes is changed.
            self.output_layer.__class__ = OutputHead

    def forward(self, batch: MicroBatch, logits: bool = False) -> Tensor | HeadResult:
        """On the last pipeline stage the `HeadResult`, on the others hidden states [t, 1, hidden].

        logits=True gives [t, vocabulary] instead of the loss, gathered over TP and without padded rows, for comparisons.
        """
        hidden: Tensor = super().forward(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed)
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        result: Tensor | HeadResult = self.output_layer(hidden, weight, batch, self.architecture, logits)
        return result

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        scale = self.architecture.embedding_scale
        if decoder_input is not None and scale != 1.0:
            # In the precision of the weights, as in transformers.
            decoder_input = decoder_input * torch.tensor(scale, dtype=decoder_input.dtype).item()
        if self.starts_gradient and self.pre_process and self.training and torch.is_grad_enabled():
            decoder_input.requires_grad_()
        return decoder_input, self._tables(position_ids[0], kwargs["packed_seq_params"]), *rest

    def _tables(self, positions: Tensor, packed: PackedRows) -> Tensor:
        """`rotary_tables` of the architecture's only rotation, or [rotations, ...] of several."""
        tables = []
        for rope, frequencies in zip(self.architecture.ropes, self.inverse_frequencies, strict=True):
            if frequencies is None:
                lengths = torch.from_numpy(packed.token_lengths).to(positions.device, non_blocking=True)
                frequencies = inverse_frequencies(rope, positions.device, lengths)
            table = rotary_tables(positions, frequencies, rope.attention_factor)
            if rope.query_beta:
                table = with_query_tables(table, positions, rope.query_beta, rope.query_original)
            tables.append(table)
        return tables[0] if len(tables) == 1 else torch.stack(tables)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # GPTModel would form all logits here; the head takes the hidden states.
        return hidden_states


def build_model(
    architecture: Architecture, layout: Layout, config: TransformerConfig, chunk: int = 0, trained: Trained | None = None
) -> SFTModel:
    """This process's part of the model, its parameters not yet set: load a checkpoint into it.

    chunk: which one, where the layout puts several on each pipeline stage. trained: with its adapters, and without gradients
    for what is frozen; everything unless given. Needs megatron-core's parallel state to have the sizes of `layout`. Under
    `torch.device("meta")` it takes no memory.
    """
    vp_stage = chunk if layout.virtual_pipeline > 1 else None
    pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    model = SFTModel(
        config=config,
        transformer_layer_spec=stage_layers(architecture, config, vp_stage),
        vocab_size=layout.padded_vocab_size(architecture),
        max_sequence_length=architecture.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        vp_stage=vp_stage,
        architecture=architecture,
    )
    _mark_split_parameters(model)
    whole = recomputed_whole(config, vp_stage)
    if config.recompute_method == "block":
        # Of the stage's layers that are recomputed, this chunk's.
        model.decoder.config = copy(config)
        model.decoder.config.recompute_num_layers = whole
    if trained is not None and trained.lora is not None:
        add_adapters(model, architecture, layout, trained.lora)
    elif trained is not None:
        freeze(model, architecture, layout, trained)
    if pre_process and not model.embedding.word_embeddings.weight.requires_grad:
        trains_nothing = not any(parameter.requires_grad for parameter in model.parameters())
        model.starts_gradient = whole > 0 or trains_nothing
    for module in model.modules():
        # Transformer Engine's layers add their weight gradients to main_grad inside the GEMM. megatron-core's switch for it
        # would ask for Apex, which only its own layers need.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = all(weight.requires_grad for weight in module.parameters(recurse=False))
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return model if on_meta else model.to(device.current())


def _mark_split_parameters(model: torch.nn.Module) -> None:
    """Mark the parameters that TP splits, which megatron-core's own layers do only when they initialise their weights.

    Without the marks the gradient norm would count the first TP rank's part alone.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dimension = 0
        elif isinstance(module, RowParallelLinear):
            dimension = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)
