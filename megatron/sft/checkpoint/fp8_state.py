"""The scales of FP8's `delayed` recipe, which come from earlier steps: a run resumed without them would differ.

Transformer Engine keeps them in each linear layer and would save them pickled; here they are tensors that any layout can load.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor, nn

from megatron.sft.checkpoint.reading import SliceReader
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.runtime import ranks

# Transformer Engine's names: of a matrix product's input, weight and output; of its gradients.
_SCALED_TENSORS = ("scaling_fwd", "scaling_bwd")


def scaling_slices(chunks: Iterable[nn.Module]) -> list[ShardSlice]:
    """The slices of scales that this process writes: none before the first step, or with another recipe."""
    slices = []
    for key, layer, is_expert in _linear_layers(chunks):
        if not _is_written_here(is_expert):
            continue
        for name in _SCALED_TENSORS:
            state = layer.fp8_meta.get(name)
            if hasattr(state, "amax_history"):
                slices.append(_slice(f"{key}.{name}", is_expert, _stacked(state)))
    return slices


def load_scaling(chunks: list[Any], reader: SliceReader) -> None:
    """Fill the scales of a model that has not taken a step yet. A checkpoint without scales leaves them as at a start."""
    config = chunks[0].config
    if not config.fp8 or config.fp8_recipe != "delayed":
        return
    recipe = get_fp8_recipe(config)
    states, slices = [], []
    for key, layer, is_expert in _linear_layers(chunks):
        layer.fp8_meta["num_gemms"] = getattr(layer, "num_gemms", 1)
        layer.init_fp8_meta_tensors(recipe)
        for name in _SCALED_TENSORS:
            if f"{key}.{name}" in reader:
                state = layer.fp8_meta[name]
                values = torch.empty_like(_stacked(state), device="cpu")
                states.append((state, values))
                slices.append(_slice(f"{key}.{name}", is_expert, values))
    if not slices:
        ranks.print_rank_0("the checkpoint has no fp8 scales: they start from their initial values")
    reader.fill(slices)
    for state, values in states:
        state.scale.copy_(values[0])
        state.amax_history.copy_(values[1:])


def _linear_layers(chunks: Iterable[Any]) -> Iterator[tuple[str, Any, bool]]:
    """Transformer Engine's linear layers: a key that is the same in every layout, the layer, whether it is an expert's."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if hasattr(module, "fp8_meta") and hasattr(module, "out_features"):
                    yield f"fp8.layers.{layer.layer_number - 1}.{name}", module, "experts" in name.split(".")


def _stacked(state: Any) -> Tensor:
    """[1 + steps of history, tensors] float32: the scales, then the largest absolute values of the last steps."""
    return torch.cat([state.scale[None], state.amax_history])


def _slice(key: str, is_expert: bool, values: Tensor) -> ShardSlice:
    """The columns of experts that are spread over processes follow each other in the stored tensor."""
    rank = parallel_state.get_expert_model_parallel_rank() if is_expert else 0
    count = parallel_state.get_expert_model_parallel_world_size() if is_expert else 1
    rows, columns = values.shape
    return ShardSlice(key, (0, rank * columns), (rows, columns), (rows, count * columns), values.dtype, lambda: values)


def _is_written_here(is_expert: bool) -> bool:
    """All processes that hold a layer, or a part of it, have the same scales."""
    if is_expert:
        ranks = parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()
    else:
        copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        ranks = copy, parallel_state.get_tensor_model_parallel_rank()
    return ranks == (0, 0)
