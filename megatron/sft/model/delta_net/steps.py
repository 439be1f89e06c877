"""What a gated delta net computes between its projections: a convolution, the gated delta rule, a gated norm.

On a GPU in 16 bits the kernels of the package flash-linear-attention; in float32 and on the CPU torch, one conversation after
another, with chunks of tokens solved together (arXiv 2412.06464, section 3.3).
"""

import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.sft.model.inputs import AttentionRuns
from megatron.sft.runtime.errors import UserError

_CHUNK = 64
# From this version on several value heads share a key head.
_LEAST = (0, 6)
# On Hopper these versions of Triton, from the first to before the last, compute wrong gradients of the delta rule; the package
# then refuses, or takes tilelang's kernel (its issue 640).
_WRONG_TRITON = ((3, 4), (3, 7, 1))


def convolved(inputs: Tensor, weight: Tensor, runs: AttentionRuns) -> Tensor:
    """silu of each channel's causal convolution over its conversation: inputs [t, channels], weight [channels, kernel]."""
    if kernels := _kernels(inputs):
        return kernels.convolved(inputs, weight, runs)
    results = []
    for part in inputs.split(runs.lengths):
        padded = F.pad(part.t(), (weight.shape[1] - 1, 0))[None]
        results.append(F.conv1d(padded, weight[:, None], groups=len(weight))[0].t())
    return F.silu(torch.cat(results))


def delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, runs: AttentionRuns) -> Tensor:
    """The gated delta rule of each conversation: query, key [t, heads, dim], value [t, value heads, dim].

    decay (a logarithm) and beta: [t, value heads]. Queries and keys are made unit vectors.
    """
    if kernels := _kernels(value):
        return kernels.delta_rule(query, key, value, decay, beta, runs)
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


def gated_norm(values: Tensor, gates: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each head times weight times silu(gate), float32 inside: values and gates [t, heads, dim]."""
    if kernels := _kernels(values):
        return kernels.gated_norm(values, gates, weight, eps)
    wide = values.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()
    return (normed * F.silu(gates.float())).to(values.dtype)


class _Kernels:
    """The functions above from the package flash-linear-attention, for all conversations at once."""

    def __init__(self) -> None:
        import fla

        if tuple(map(int, fla.__version__.split(".")[:2])) < _LEAST:
            raise ImportError(f"version {fla.__version__} does not share a key among values")
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        self._convolution, self._norm, self._rule = causal_conv1d, rms_norm_gated, chunk_gated_delta_rule

    def convolved(self, inputs: Tensor, weight: Tensor, runs: AttentionRuns) -> Tensor:
        starts = {"cu_seqlens": runs.cu_seqlens, "cu_seqlens_cpu": runs.host_cu_seqlens}
        result = self._convolution(inputs.contiguous()[None], weight, activation="silu", **starts)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output[0]

    def delta_rule(self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, runs: AttentionRuns) -> Tensor:
        arrays = (array.contiguous()[None] for array in (query, key, value, decay, beta))
        starts = {"cu_seqlens": runs.cu_seqlens, "cu_seqlens_cpu": runs.host_cu_seqlens}
        output, _ = self._rule(*arrays, use_qk_l2norm_in_kernel=True, **starts)
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
            f"gated delta nets need the package flash-linear-attention, 0.6 or later, on a GPU ({error}): "
            "pip install 'flash-linear-attention>=0.6', or PRECISION=fp32 for a test"
        ) from None


def _kernels(inputs: Tensor) -> _Kernels | None:
    return _flash_linear_attention() if inputs.is_cuda and inputs.dtype != torch.float32 else None


def check_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """A `UserError` now, rather than in the first step, where the package is needed and missing."""
    if device.type == "cuda" and dtype != torch.float32:
        _flash_linear_attention()
        _check_hopper(device)


def _check_hopper(device: torch.device) -> None:
    """A `UserError` where the package would refuse the first backward pass."""
    import triton

    if not needs_tilelang(torch.cuda.get_device_capability(device)[0], triton.__version__):
        return
    reason = f"Triton {triton.__version__} computes wrong gradients of gated delta nets on this GPU"
    if find_spec("tilelang") is None:
        raise UserError(f"{reason}, and tilelang, whose kernel is right, is not installed: pip install 'tilelang>=0.1.9'")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if shutil.which("nvcc") is None and not any(home and (Path(home) / "bin" / "nvcc").exists() for home in homes):
        raise UserError(f"{reason}, and tilelang needs CUDA's compiler nvcc, which is not found: set CUDA_HOME to its folder")


def needs_tilelang(capability: int, triton_version: str) -> bool:
    """True for Hopper, whose major compute capability is 9, with a version of Triton that is wrong there."""
    first, fixed = _WRONG_TRITON
    version = tuple(int(part) for part in triton_version.split("+")[0].split(".")[:3])
    return capability == 9 and first <= version < fixed
