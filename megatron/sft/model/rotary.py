"""Rotary positions: query and key vectors rotated by their token's position in its conversation.

Pair i of a head is (i, i + rotated / 2), as Hugging Face's Llama, Qwen and Mistral have it; `rotated` is all of the head, or
its first dimensions. Where a family has neighbours as pairs, conversion reorders them (`families/rules.py`).
"""

from typing import Any

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, inverse_frequencies: Tensor, factor: float = 1.0) -> Tensor:
    """Cosines and sines, float32 [2, t, rotated / 2], of positions [t] times inverse_frequencies; times `factor`.

    inverse_frequencies: [rotated / 2], or [t, rotated / 2] where conversations differ in them.
    """
    angles = positions.to(torch.float32)[:, None] * inverse_frequencies
    tables = torch.stack([angles.cos(), angles.sin()])
    return tables if factor == 1.0 else tables * factor


def with_query_tables(tables: Tensor, positions: Tensor, beta: float, original: int) -> Tensor:
    """[2, 2, t, rotated / 2]: the tables of keys, and those of queries, which grow with the position (Llama 4's scaling)."""
    growth = 1 + beta * torch.log(1 + torch.floor(positions / original))
    return torch.stack([tables, tables * growth[:, None]])


def split_and_rotate(qkv: Tensor, tables: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [t, heads, dim] and keys [t, groups, dim], rotated, and values [t, groups, dim].

    qkv: [t, groups * (heads / groups + 2) * dim], in each group its queries, its key, its value. tables: of `rotary_tables`
    or `with_query_tables`.
    """
    result: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(qkv.contiguous(), tables, num_groups, head_dim)
    return result


def split_heads(qkv: Tensor, num_groups: int, head_dim: int, num_queries: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Queries, gates of the output, keys and values, not rotated. num_queries: of a group, as are the gates, if there are any.

    Queries, keys and values are [t, heads, dim], gates [t, groups, num_queries * dim].
    """
    by_group = qkv.view(qkv.shape[0], num_groups, -1, head_dim)
    num_gates = by_group.shape[2] - 2 - num_queries
    queries, gates, keys, values = by_group.split([num_queries, num_gates, 1, 1], dim=2)
    return queries.flatten(1, 2), gates.flatten(2) if num_gates else None, keys.squeeze(2), values.squeeze(2)


def rotate(heads: Tensor, tables: Tensor) -> Tensor:
    """heads [t, heads, dim], each rotated by its token's angles."""
    result: Tensor = _Rotate.apply(heads.contiguous(), tables)
    return result


def _apply_rotary(heads: Tensor, tables: Tensor, sign: int) -> Tensor:
    half = tables.shape[-1]
    first, second, rest = heads.float().split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    cosine, sine = tables[0][:, None], sign * tables[1][:, None]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1).to(heads.dtype)


def tables_of(tables: Tensor, queries: bool) -> Tensor:
    """The cosines and sines of queries, or of keys: the same, unless they are apart."""
    return tables[int(queries)] if tables.dim() == 4 else tables


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, tables: Tensor) -> Tensor:
        ctx.save_for_backward(tables)
        if not heads.is_cuda:
            return _apply_rotary(heads, tables, 1)
        from megatron.sft.kernels import layer

        outputs = torch.empty_like(heads)
        layer.rotate(heads, tables, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (tables,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if not gradient.is_cuda:
            return _apply_rotary(gradient, tables, -1), None
        from megatron.sft.kernels import layer

        inputs = torch.empty_like(gradient)
        layer.rotate(inputs, tables, gradient, backward=True)
        return inputs, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tables: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tables)
        ctx.num_groups, ctx.shape = num_groups, qkv.shape
        if not qkv.is_cuda:
            num_queries = qkv.shape[1] // (head_dim * num_groups) - 2
            queries, _, keys, values = split_heads(qkv, num_groups, head_dim, num_queries)
            queries, keys = (
                _apply_rotary(heads, tables_of(tables, is_query), 1) for heads, is_query in ((queries, True), (keys, False))
            )
            return queries, keys, values.contiguous()
        from megatron.sft.kernels import layer

        num_tokens, num_heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_groups
        queries = qkv.new_empty(num_tokens, num_heads, head_dim)
        keys, values = (qkv.new_empty(num_tokens, num_groups, head_dim) for _ in range(2))
        layer.rotate_heads(qkv, tables, queries, keys, values)
        return queries, keys, values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (tables,) = ctx.saved_tensors
        queries, keys, values = (gradient.contiguous() for gradient in gradients)
        if queries.is_cuda:
            from megatron.sft.kernels import layer

            qkv = queries.new_empty(ctx.shape)
            layer.rotate_heads(qkv, tables, queries, keys, values, backward=True)
            return qkv, None, None, None
        of_queries = _apply_rotary(queries, tables_of(tables, True), -1).unflatten(1, (ctx.num_groups, -1))
        of_keys = _apply_rotary(keys, tables_of(tables, False), -1)[:, :, None]
        qkv = torch.cat([of_queries, of_keys, values[:, :, None]], dim=2).view(ctx.shape)
        return qkv, None, None, None
