"""Whether Transformer Engine's attention over packed rows is right for heads of a size.

Up to 128 it is. Beyond, and for values of another size than keys, it depends on the GPU, on cuDNN and on its own version, and
one of them (2.11 with torch 2.11's cuDNN on Hopper) silently gives wrong results for 256.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.sft.runtime import device, ranks

_ALWAYS_RIGHT = 128
# Conversations of a row, of more and less than a kernel's block, and padding.
_LENGTHS, _HEADS, _TOLERANCE = (90, 5, 150), 4, 0.05


@cache
def engine_is_right(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Tried once, forward and backward, next to torch's attention in float32. Says so if it is not."""
    if max(key_dim, value_dim) <= _ALWAYS_RIGHT and key_dim == value_dim:
        return True
    with torch.enable_grad(), torch.device(device.current()):
        generator = torch.Generator(device.current()).manual_seed(0)
        shapes = [(sum(_LENGTHS), _HEADS, size) for size in (key_dim, key_dim, value_dim, value_dim)]
        *inputs, weights = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        try:
            found = _with_gradients(_engine, [each.clone().requires_grad_() for each in inputs], weights)
        except Exception as error:  # versions differ in how they refuse
            reason = f"refuses them ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        else:
            wanted = _with_gradients(_exact, [each.float().requires_grad_() for each in inputs], weights.float())
            pairs = zip(found, wanted, strict=True)
            # A value that is not finite is not near.
            if all(bool((one - other).abs().max() <= _TOLERANCE * other.abs().max()) for one, other in pairs):
                return True
            reason = "computes them wrongly"
    ranks.print_rank_0(
        f"Transformer Engine's attention is not used with keys of {key_dim} and values of {value_dim}: "
        f"it {reason} on this machine"
    )
    return False


def _with_gradients(attention: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    result = attention(*inputs)
    return [result, *torch.autograd.grad(result, inputs, weights)]


def _engine(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from transformer_engine.pytorch import DotProductAttention

    ends = torch.tensor([0, *_LENGTHS]).cumsum(0).int()
    runs = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": max(_LENGTHS), "max_seqlen_kv": max(_LENGTHS)}
    sizes = query.shape[-1] if query.shape == value.shape else (query.shape[-1], value.shape[-1])
    attention = DotProductAttention(_HEADS, sizes, attn_mask_type="padding_causal", qkv_format="thd")
    result: Tensor = attention(query, key, value, None, qkv_format="thd", attn_mask_type="padding_causal", **runs)
    return result.view(len(query), _HEADS, -1)


def _exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    results = []
    for parts in zip(*(each.split(_LENGTHS) for each in (query, key, value)), strict=True):
        q, k, v = (part.transpose(0, 1) for part in parts)
        results.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    return torch.cat(results)
