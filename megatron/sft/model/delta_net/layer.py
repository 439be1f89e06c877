"""The gated delta net of Qwen3-Next and Qwen3.5: linear attention with a state that each conversation starts empty.

Formulas: Yang et al., "Gated Delta Networks" (arXiv 2412.06464).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron.sft.families.architecture import DeltaNetConfig
from megatron.sft.model.delta_net import steps
from megatron.sft.model.inputs import AttentionRuns
from megatron.sft.runtime import device

_SPLIT = {"conv1d.weight": 0, "A_log": 0, "dt_bias": 0}


class GatedDeltaNet(MegatronModule):
    """Takes the place of a layer's attention: `in_proj`, then `mix`, whose last step is `out_proj`.

    Tensor parallelism splits it by key heads, each with its value heads: a row of `in_proj`'s output has, head by head, the
    query, the key, the values and their gates, and two step sizes a value head.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, sizes: DeltaNetConfig, linear: tuple[type, type], **_: Any
    ) -> None:
        """linear: the classes of the column- and the row-parallel layer."""
        super().__init__(config=config)
        steps.check_kernels(config.params_dtype, device.current())
        size = parallel_state.get_tensor_model_parallel_world_size()
        self.sizes, self.num_heads = sizes, sizes.num_key_heads // size
        values = sizes.num_value_heads * sizes.value_dim
        options = {
            "config": config,
            "bias": False,
            "is_expert": False,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
        }
        self.in_proj = build_module(
            linear[0], config.hidden_size, sizes.input_rows, init_method=config.init_method, gather_output=False,
            skip_bias_add=False, tp_comm_buffer_name="fc1", **options,
        )  # fmt: skip
        self.out_proj = build_module(
            linear[1], values, config.hidden_size, init_method=config.output_layer_init_method, input_is_parallel=True,
            skip_bias_add=True, tp_comm_buffer_name="fc2", **options,
        )  # fmt: skip
        self.conv1d = _Weight(sizes.convolved_rows // size, 1, sizes.kernel, dtype=config.params_dtype)
        self.A_log = torch.nn.Parameter(torch.zeros(sizes.num_value_heads // size, dtype=config.params_dtype))
        self.dt_bias = torch.nn.Parameter(torch.zeros(sizes.num_value_heads // size, dtype=config.params_dtype))
        for parameter in (self.conv1d.weight, self.A_log, self.dt_bias):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.out_norm = _Weight(sizes.value_dim, dtype=config.params_dtype)

    def mix(self, projected: Tensor, runs: AttentionRuns) -> tuple[Tensor, Tensor | None]:
        """projected [t, 1, input rows / TP] of `in_proj` to (the layer's attention output, None): as linear layers return."""
        sizes, heads = self.sizes, self.num_heads
        values, each = sizes.values_per_key * sizes.value_dim, sizes.values_per_key
        by_head = projected.view(projected.shape[0], heads, -1)
        mixed, gates, beta, decay = by_head.split([2 * sizes.key_dim + values, values, each, each], dim=-1)
        decay = -self.A_log.float().exp() * F.softplus(decay.flatten(1).float() + self.dt_bias.float())
        beta = beta.flatten(1).sigmoid()  # [t, value heads]
        mixed = steps.convolved(mixed.flatten(1), self.conv1d.weight.squeeze(1), runs).unflatten(1, (heads, -1))
        query, key, value = mixed.split([sizes.key_dim, sizes.key_dim, values], dim=-1)
        value = value.reshape(len(value), -1, sizes.value_dim)
        result = steps.delta_rule(query, key, value, decay, beta, runs)  # [t, value heads, value dim]
        gates = gates.reshape(result.shape)
        # Each rank norms the heads that it holds: its copy of the weight gets the sum of the ranks' gradients.
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight)
        normed = steps.gated_norm(result, gates, weight, self.config.layernorm_epsilon)
        output: tuple[Tensor, Tensor | None] = self.out_proj(normed.view(projected.shape[0], 1, -1))
        return output

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core's description of the weights: those of the linear layers are theirs, the others stand here."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result: dict[str, Any] = {}
        for name, linear in (("in_proj", self.in_proj), ("out_proj", self.out_proj)):
            result |= linear.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        own = {
            name: parameter for name, parameter in self.state_dict(prefix="", keep_vars=True).items() if "_proj." not in name
        }
        group = parallel_state.get_tensor_model_parallel_group()
        split = make_sharded_tensors_for_checkpoint(
            own, prefix, _SPLIT, sharded_offsets, tp_group=group, dp_cp_group=metadata["dp_cp_group"]
        )
        return {**result, **split}


class _Weight(torch.nn.Module):
    """A weight of ones under a module's name."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
