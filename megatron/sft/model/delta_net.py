"""The gated delta net of Qwen3-Next and Qwen3.5: linear attention with a state that each conversation starts empty.

Formulas: Yang et al., "Gated Delta Networks" (arXiv 2412.06464); chunks of tokens are solved together (its section 3.3). On a
GPU the kernels of the package flash-linear-attention, in float32 and on the CPU torch, one conversation after another.
"""

from functools import cache
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
from megatron.sft.model.inputs import AttentionRuns
from megatron.sft.runtime.errors import UserError

_CHUNK = 64
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
        values, steps = sizes.values_per_key * sizes.value_dim, sizes.values_per_key
        by_head = projected.view(projected.shape[0], heads, -1)
        mixed, gates, beta, decay = by_head.split([2 * sizes.key_dim + values, values, steps, steps], dim=-1)
        decay = -self.A_log.float().exp() * F.softplus(decay.flatten(1).float() + self.dt_bias.float())
        beta = beta.flatten(1).sigmoid()  # [t, value heads]
        kernels = _flash_linear_attention() if projected.is_cuda and projected.dtype != torch.float32 else None
        convolve = _convolved if kernels is None else kernels.convolved
        mixed = convolve(mixed.flatten(1), self.conv1d.weight.squeeze(1), runs).unflatten(1, (heads, -1))
        query, key, value = mixed.split([sizes.key_dim, sizes.key_dim, values], dim=-1)
        value = value.reshape(len(value), -1, sizes.value_dim)
        delta_rule = _delta_rule if kernels is None else kernels.delta_rule
        result = delta_rule(query, key, value, decay, beta, runs)  # [t, value heads, value dim]
        gates = gates.reshape(result.shape)
        # Each rank norms the heads that it holds: its copy of the weight gets the sum of the ranks' gradients.
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight)
        normed = _gated_norm(result, gates, weight, self.config.layernorm_epsilon)
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


def _convolved(inputs: Tensor, weight: Tensor, runs: AttentionRuns) -> Tensor:
    """silu of each channel's causal convolution over its conversation: inputs [t, channels], weight [channels, kernel]."""
    results = []
    for part in inputs.split(runs.lengths):
        padded = F.pad(part.t(), (weight.shape[1] - 1, 0))[None]
        results.append(F.conv1d(padded, weight[:, None], groups=len(weight))[0].t())
    return F.silu(torch.cat(results))


def _delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, runs: AttentionRuns) -> Tensor:
    """The gated delta rule of each conversation: query, key [t, heads, dim], value [t, value heads, dim].

    decay (a logarithm) and beta: [t, value heads]. Queries and keys are made unit vectors.
    """
    repeats = value.shape[1] // key.shape[1]
    query, key = (_unit(heads.float()).repeat_interleave(repeats, dim=1) for heads in (query, key))
    arrays = (query * query.shape[-1] ** -0.5, key, value.float(), decay, beta.float())
    parts = zip(*(array.split(runs.lengths) for array in arrays), strict=True)
    return torch.cat([_delta_rule_of_one(*(array.transpose(0, 1) for array in part)) for part in parts]).to(value.dtype)


def _unit(heads: Tensor) -> Tensor:
    return heads * torch.rsqrt(heads.pow(2).sum(dim=-1, keepdim=True) + 1e-6)


def _delta_rule_of_one(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """[length, heads, dim] of one conversation, from arrays [heads, length, ...] in float32.

    With the state S, per token: S = exp(decay) S; S += k (beta (v - S^T k))^T; output S^T q. In a chunk the corrections of all
    tokens solve one triangular system.
    """
    state = query.new_zeros(len(key), key.shape[-1], value.shape[-1])
    outputs = []
    for q, k, v, g, b in zip(*(array.split(_CHUNK, dim=1) for array in (query, key, value, decay, beta)), strict=True):
        total = g.cumsum(dim=1)  # [heads, chunk]
        # What is left at the row's token of what the column's token wrote. Masked before exp, which would overflow.
        above = torch.ones(g.shape[1], g.shape[1], dtype=torch.bool, device=g.device).triu(1)
        left = (total[:, :, None] - total[:, None, :]).masked_fill(above, float("-inf")).exp()
        system = (b[..., None] * k) @ k.transpose(1, 2) * left
        wanted = b[..., None] * (v - total.exp()[..., None] * (k @ state))
        written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(total.exp()[..., None] * (q @ state) + (q @ k.transpose(1, 2) * left) @ written)
        to_end = (total[:, -1:] - total).exp()[..., None]
        state = total[:, -1].exp()[:, None, None] * state + (k * to_end).transpose(1, 2) @ written
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _gated_norm(values: Tensor, gates: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each head times weight times silu(gate), float32 inside: values and gates [t, heads, dim]."""
    if values.is_cuda and values.dtype != torch.float32:
        return _flash_linear_attention().gated_norm(values, gates, weight, eps)
    wide = values.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()
    return (normed * F.silu(gates.float())).to(values.dtype)


class _Kernels:
    """The functions above from the package flash-linear-attention, for all conversations at once."""

    def __init__(self) -> None:
        from fla.modules.convolution import causal_conv1d
        from fla.modules.fused_norm_gate import rms_norm_gated
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        self._convolution, self._norm, self._rule = causal_conv1d, rms_norm_gated, chunk_gated_delta_rule

    def convolved(self, inputs: Tensor, weight: Tensor, runs: AttentionRuns) -> Tensor:
        result = self._convolution(inputs.contiguous()[None], weight, activation="silu", cu_seqlens=runs.cu_seqlens)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output[0]

    def delta_rule(self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, runs: AttentionRuns) -> Tensor:
        arrays = (array.contiguous()[None] for array in (query, key, value, decay, beta))
        output, _ = self._rule(*arrays, use_qk_l2norm_in_kernel=True, cu_seqlens=runs.cu_seqlens)
        result: Tensor = output[0]
        return result

    def gated_norm(self, values: Tensor, gates: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = self._norm(values.contiguous(), gates.contiguous(), weight, None, activation="swish", eps=eps)
        return result


@cache
def _flash_linear_attention() -> _Kernels:
    """A `UserError` where the package is not installed."""
    try:
        return _Kernels()
    except ImportError as error:
        raise UserError(
            f"the gated delta net needs the package flash-linear-attention on a GPU ({error}): "
            "pip install flash-linear-attention, or PRECISION=fp32 for a test"
        ) from None


def check_kernels(dtype: torch.dtype, on_gpu: bool) -> None:
    """A `UserError` now, rather than in the first step, where the kernels of a model with gated delta nets are missing."""
    if on_gpu and dtype != torch.float32:
        _flash_linear_attention()
