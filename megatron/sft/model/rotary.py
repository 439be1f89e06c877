"""Rotary positions: query and key vectors rotated by their token's position in its conversation.

Pair i of a head is (i, i + head_dim / 2), as Hugging Face's Llama, Qwen and Mistral have it.
"""

from typing import Any

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Cosines and sines, float32 [2, t, head_dim / 2], of positions [t] times inverse_frequencies [head_dim / 2]."""
    angles = torch.outer(positions.to(torch.float32), inverse_frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def split_and_rotate(qkv: Tensor, tables: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [t, heads, dim] and keys [t, groups, dim], rotated, and values [t, groups, dim].

    qkv: [t, groups * (heads / groups + 2) * dim], in each group its queries, its key, its value.
    """
    result: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(qkv.contiguous(), tables, num_groups, head_dim)
    return result


def split_heads(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `split_and_rotate`, not rotated."""
    by_group = qkv.view(qkv.shape[0], num_groups, -1, head_dim)
    queries, keys, values = by_group.split([by_group.shape[2] - 2, 1, 1], dim=2)
    return queries.flatten(1, 2), keys.squeeze(2), values.squeeze(2)


def rotate(heads: Tensor, tables: Tensor) -> Tensor:
    """heads [t, heads, dim], each rotated by its token's angles."""
    result: Tensor = _Rotate.apply(heads.contiguous(), tables)
    return result


def _apply_rotary(heads: Tensor, tables: Tensor, sign: int) -> Tensor:
    first, second = heads.float().chunk(2, dim=-1)
    cosine, sine = tables[0][:, None], sign * tables[1][:, None]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(heads.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, tables: Tensor) -> Tensor:
        ctx.save_for_backward(tables)
        if not heads.is_cuda:
            return _apply_rotary(heads, tables, 1)
        from megatron.sft.model.kernels import layer

        outputs = torch.empty_like(heads)
        layer.rotate(heads, tables, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (tables,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if not gradient.is_cuda:
            return _apply_rotary(gradient, tables, -1), None
        from megatron.sft.model.kernels import layer

        inputs = torch.empty_like(gradient)
        layer.rotate(inputs, tables, gradient, backward=True)
        return inputs, None


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tables: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tables)
        ctx.num_groups, ctx.shape = num_groups, qkv.shape
        if not qkv.is_cuda:
            queries, keys, values = split_heads(qkv, num_groups, head_dim)
            return _apply_rotary(queries, tables, 1), _apply_rotary(keys, tables, 1), values.contiguous()
        from megatron.sft.model.kernels import layer

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
            from megatron.sft.model.kernels import layer

            qkv = queries.new_empty(ctx.shape)
            layer.rotate_heads(qkv, tables, queries, keys, values, backward=True)
            return qkv, None, None, None
        of_queries = _apply_rotary(queries, tables, -1).unflatten(1, (ctx.num_groups, -1))
        of_keys = _apply_rotary(keys, tables, -1)[:, :, None]
        qkv = torch.cat([of_queries, of_keys, values[:, :, None]], dim=2).view(ctx.shape)
        return qkv, None, None, None
