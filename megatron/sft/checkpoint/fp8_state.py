"""The scales of FP8's `delayed` recipe, which come from earlier steps: without them a run would not go on as it was.

Transformer Engine keeps them in each linear layer and would save them pickled; here they are tensors of any layout's run.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor, nn

from megatron.sft.checkpoint.piece_reader import PieceReader
from megatron.sft.checkpoint.pieces import Piece
from megatron.sft.runtime import ranks

# Transformer Engine's names: of a matrix product's input, weight and output; of its gradients.
_SCALED_TENSORS = ("scaling_fwd", "scaling_bwd")


def scaling_pieces(chunks: Iterable[nn.Module]) -> list[Piece]:
    """What this process writes. Nothing before the first step, or with another recipe."""
    pieces = []
    for key, layer, is_expert in _linear_layers(chunks):
        if not _is_written_here(is_expert):
            continue
        for name in _SCALED_TENSORS:
            state = layer.fp8_meta.get(name)
            if hasattr(state, "amax_history"):
                pieces.append(_piece(f"{key}.{name}", is_expert, _joined(state)))
    return pieces


def load_scaling(chunks: list[Any], reader: PieceReader) -> None:
    """Fill the scales of a model that has taken no step yet. Those of a run without them begin anew."""
    config = chunks[0].config
    if not config.fp8 or config.fp8_recipe != "delayed":
        return
    recipe = get_fp8_recipe(config)
    states, pieces = [], []
    for key, layer, is_expert in _linear_layers(chunks):
        layer.fp8_meta["num_gemms"] = getattr(layer, "num_gemms", 1)
        layer.init_fp8_meta_tensors(recipe)
        for name in _SCALED_TENSORS:
            if f"{key}.{name}" in reader:
                state = layer.fp8_meta[name]
                values = torch.empty_like(_joined(state), device="cpu")
                states.append((state, values))
                pieces.append(_piece(f"{key}.{name}", is_expert, values))
    if not pieces:
        ranks.print_rank_0("the checkpoint has no fp8 scales: they begin anew")
    reader.fill(pieces)
    for state, values in states:
        state.scale.copy_(values[0])
        state.amax_history.copy_(values[1:])


def _linear_layers(chunks: Iterable[Any]) -> Iterator[tuple[str, Any, bool]]:
    """Transformer Engine's linear layers: a name that is the same in every layout, the layer, whether it is of experts."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if hasattr(module, "fp8_meta") and hasattr(module, "out_features"):
                    yield f"fp8.layers.{layer.layer_number - 1}.{name}", module, "experts" in name.split(".")


def _joined(state: Any) -> Tensor:
    """[1 + steps of history, tensors] float32: the scales, then the largest values of the last steps."""
    return torch.cat([state.scale[None], state.amax_history])


def _piece(key: str, is_expert: bool, values: Tensor) -> Piece:
    """Experts that are spread over processes lie side by side, product after product."""
    rank = parallel_state.get_expert_model_parallel_rank() if is_expert else 0
    count = parallel_state.get_expert_model_parallel_world_size() if is_expert else 1
    rows, columns = values.shape
    taken = partial(torch.Tensor.view, values, rows, columns)
    return Piece(key, (0, rank * columns), (rows, columns), (rows, count * columns), values.dtype, taken)


def _is_written_here(is_expert: bool) -> bool:
    """All processes that hold a layer, or a part of it, have the same scales."""
    if is_expert:
        ranks = parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()
    else:
        copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        ranks = copy, parallel_state.get_tensor_model_parallel_rank()
    return ranks == (0, 0)
