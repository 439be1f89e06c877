"""torch's flash attention in 16 bits on a GPU, over runs of tokens: plain, and with sinks.

A sink (gpt-oss) is one score more of a head, whose share of the softmax goes nowhere. With S the scores, l = log sum exp(S) and
s the sink, the weights are exp(S - l'), l' = log(exp(l) + exp(s)), so the result is that of plain attention times exp(l - l').
Flash attention's backward pass makes weights of the scores and of l, and subtracts the gradient's mean, which it finds from the
result: given l' and the result here, it gives the gradients with the sink.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron.sft.model.inputs import AttentionRuns
from megatron.sft.runtime.errors import UserError


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    key_cu_seqlens: Tensor,
    longest: int,
    longest_key: int,
    scale: float,
    window: tuple[int, int] = (-1, 0),
) -> Tensor:
    """torch's causal flash attention in 16 bits over runs of tokens: query [t, heads, dim], key, value [k, kv heads, dim]."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = cu_seqlens, key_cu_seqlens, longest, longest_key
    context = varlen_attn(query, key, value, *lengths, scale=scale, window_size=window, **_options(query, key))
    assert isinstance(context, Tensor)
    return context


def check(dtype: torch.dtype, device: torch.device) -> None:
    """A `UserError` now, rather than in the first step, where this torch has no such attention."""
    if device.type == "cuda" and dtype != torch.float32 and (missing := _missing()):
        raise UserError(
            f"this model's attention needs torch 2.11 or later in 16 bits ({torch.__version__}'s varlen_attn lacks "
            f"{', '.join(missing)}): take a newer container, or PRECISION=fp32 for a test"
        )


@cache
def _missing() -> tuple[str, ...]:
    """What of `varlen_attn` this torch does not have; empty from 2.11 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ("everything",)
    return tuple(sorted({"scale", "window_size", "return_aux"} - set(inspect.signature(varlen_attn).parameters)))


def _options(query: Tensor, key: Tensor) -> dict[str, Any]:
    return {"enable_gqa": True} if query.shape[1] != key.shape[1] and _varlen_asks_for_groups() else {}


@cache
def _varlen_asks_for_groups() -> bool:
    """True if this torch's varlen_attn has an option for fewer key than query heads (2.11's takes them without one)."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, runs: AttentionRuns, scale: float, window: tuple[int, int]
) -> Tensor:
    """Causal attention in 16 bits: query [t, heads, dim], key and value [k, kv heads, dim], sinks [heads]."""
    result: Tensor = _AttentionWithSinks.apply(query, key, value, sinks, runs, scale, window)
    return result


class _AttentionWithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        runs: AttentionRuns,
        scale: float,
        window: tuple[int, int],
    ) -> Tensor:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        lengths = runs.cu_seqlens, runs.key_cu_seqlens, max(runs.lengths), max(runs.key_lengths)
        options: dict[str, Any] = {"scale": scale, "window_size": window, **_options(query, key)}
        plain, logsumexp = varlen_attn(query, key, value, *lengths, return_aux=AuxRequest(lse=True), **options)
        total = torch.logaddexp(logsumexp, sinks.float()[:, None])  # [heads, t] float32
        result: Tensor = (plain * (logsumexp - total).exp().t()[..., None]).to(plain.dtype)
        ctx.save_for_backward(query, key, value, sinks, result, total)
        ctx.lengths, ctx.how = lengths, (scale, window)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, result, total = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        scale, window = ctx.how
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout of 0
        causal = window == (-1, 0)
        of_heads = torch.ops.torch_attn._varlen_attn_backward(
            gradient, query, key, value, result, total, *ctx.lengths, causal, state, scale, list(window)
        )
        mean = torch.linalg.vecdot(gradient.float(), result.float()).t()  # [heads, t]
        of_sinks = -((sinks.float()[:, None] - total).exp() * mean).sum(dim=1)
        return *of_heads, of_sinks.to(sinks.dtype), None, None, None
