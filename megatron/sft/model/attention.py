"""Attention over packed rows without Transformer Engine: every conversation attends to itself only."""

import inspect
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron.sft.model.inputs import AttentionRuns, PackedRows


class PackedAttention(MegatronModule):
    """Causal attention inside each conversation; takes the place of megatron-core's core attention.

    In 16 bits on a GPU one variable-length flash attention call, else one product after another, a conversation at a time. With
    context parallelism each rank gathers the keys and values of all of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        window: int | None = None,
        sinks: bool = False,
    ) -> None:
        """window: tokens that one attends to, itself included; None: all. sinks: a learnt score of each head for nothing."""
        super().__init__(config=config)
        # (tokens before the own one, 0); -1 before it means all.
        self.window = (-1 if window is None else window - 1, 0)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.softmax_offset: torch.nn.Parameter | None = None
        if sinks:
            size = config.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [t, heads, dim], key and value [t, kv heads, dim] to [t, heads * dim], t all tokens of the micro-batch (on
        this context-parallel rank). Where there is no kernel for 16 bits, values may have another size, the result's then."""
        assert isinstance(packed_seq_params, PackedRows), "rows are always packed"
        runs = packed_seq_params.runs
        assert runs is not None
        if runs.key_order is not None:
            key, value = _gathered(key, value, runs.key_order)
        return self.attend(query, key, value, runs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, runs: AttentionRuns) -> Tensor:
        """The same with keys and values of all context-parallel ranks, in the order of `runs.key_order`."""
        # Flash attention computes in 16 bits only.
        flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        if self.softmax_offset is not None and flash:
            context = attention_with_sinks(query, key, value, self.softmax_offset, runs, self.softmax_scale, self.window)
        elif self.softmax_offset is not None:
            context = self._with_sinks(query, key, value, runs)
        elif flash:
            context = self._varlen(query, key, value, runs)
        else:
            context = self._run_by_run(query, key, value, runs)
        return context.reshape(query.shape[0], -1)

    def _run_by_run(self, query: Tensor, key: Tensor, value: Tensor, runs: AttentionRuns) -> Tensor:
        contexts = []
        for q, k, v in zip(query.split(runs.lengths), key.split(runs.key_lengths), value.split(runs.key_lengths), strict=True):
            context = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],  # [1, heads, length, dim]
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                **self._mask(len(q), len(k), q.device),
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            contexts.append(context[0].transpose(0, 1))
        return torch.cat(contexts)

    def _with_sinks(self, query: Tensor, key: Tensor, value: Tensor, runs: AttentionRuns) -> Tensor:
        """Softmax over the scores and one more, the head's sink, whose share goes nowhere; one conversation after another."""
        assert self.softmax_offset is not None
        contexts = []
        for q, k, v in zip(query.split(runs.lengths), key.split(runs.key_lengths), value.split(runs.key_lengths), strict=True):
            k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k).float() * self.softmax_scale
            mask = self._mask(len(q), len(k), q.device, explicit=True)["attn_mask"]
            sinks = self.softmax_offset.float()[:, None, None].expand(-1, len(q), 1)
            shares = torch.cat([scores.masked_fill(~mask, float("-inf")), sinks], dim=-1).softmax(dim=-1)[..., :-1]
            contexts.append(torch.einsum("hqk,khd->qhd", shares.to(v.dtype), v))
        return torch.cat(contexts)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core's description of the sinks, if there are any: split over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        group = parallel_state.get_tensor_model_parallel_group()
        data_parallel = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"softmax_offset": 0}, sharded_offsets, tp_group=group, dp_cp_group=data_parallel
        )

    def _mask(self, length: int, key_length: int, device: torch.device, explicit: bool = False) -> dict[str, Any]:
        """Causal for queries that stand at the end of the keys, and with a window no further back than it reaches.

        A mask is [length, key_length], True where seen; unless `explicit` none is made where "causal" says it.
        """
        before = self.window[0]
        if not explicit and length == key_length and (before < 0 or length <= before + 1):
            return {"is_causal": True}
        distance = torch.arange(key_length - length, key_length, device=device)[:, None] - torch.arange(
            key_length, device=device
        )
        return {"attn_mask": (distance >= 0) & ((distance <= before) | (before < 0))}

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, runs: AttentionRuns) -> Tensor:
        # Flash attention counts from the end of the keys, where the queries stand.
        longest = max(runs.lengths), max(runs.key_lengths)
        return varlen_attention(
            query, key, value, runs.cu_seqlens, runs.key_cu_seqlens, *longest, self.softmax_scale, self.window
        )


def attention_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, runs: AttentionRuns, scale: float, window: tuple[int, int]
) -> Tensor:
    """torch's causal flash attention in 16 bits over runs of tokens, each head of which has another score, `sinks` [heads].

    query [t, heads, dim], key, value [k, kv heads, dim]. The sink takes a share of the softmax and gives nothing for it.
    """
    result: Tensor = _FlashWithSinks.apply(query, key, value, sinks, runs, scale, window)
    return result


class _FlashWithSinks(torch.autograd.Function):
    """Flash attention knows no sinks, but its logarithms of sums do: with those of a softmax that has one, its backward pass is
    that softmax's. In it a score's gradient is share * (gradient of the share - sum over the token's gradient * result), and a
    sink changes nothing but the shares and the result.
    """

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
        places = (runs.cu_seqlens, runs.key_cu_seqlens, max(runs.lengths), max(runs.key_lengths), 0.0, window == (-1, 0))
        options = {"scale": scale, "window_size_left": window[0], "window_size_right": window[1]}
        result, sums, *states, _ = torch.ops.aten._flash_attention_forward(query, key, value, *places, False, **options)
        whole = torch.logaddexp(sums, sinks.float()[:, None])  # [heads, t]
        context = (result.float() * (sums - whole).exp().t()[:, :, None]).to(result.dtype)
        ctx.save_for_backward(query, key, value, sinks, context, whole, *states)
        ctx.places, ctx.options = places, options
        return context

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, context, whole, *states = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_heads = torch.ops.aten._flash_attention_backward(
            gradient, query, key, value, context, whole, *ctx.places, *states, **ctx.options
        )
        products = (gradient.float() * context.float()).sum(dim=-1).t()  # [heads, t]
        of_sinks = -((sinks.float()[:, None] - whole).exp() * products).sum(dim=1)
        return *of_heads, of_sinks.to(sinks.dtype), None, None, None


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

    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and _varlen_asks_for_groups():
        options["enable_gqa"] = True
    context = varlen_attn(
        query, key, value, cu_seqlens, key_cu_seqlens, longest, longest_key, scale=scale, window_size=window, **options
    )
    assert isinstance(context, Tensor)
    return context


@cache
def _varlen_asks_for_groups() -> bool:
    """True if this torch's varlen_attn has an option for fewer key than query heads (2.11's takes them without one)."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _gathered(key: Tensor, value: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of all context-parallel ranks, picked by `order`: each [len(order), kv heads, dim].

    Backward sums what each rank's queries give to a key on the rank that holds it.
    """
    both = tensor_parallel.gather_from_sequence_parallel_region(
        torch.stack([key, value], dim=1),  # [t, 2, kv heads, dim]
        tensor_parallel_output_grad=True,
        group=parallel_state.get_context_parallel_group(),
    )
    key, value = both.index_select(0, order).unbind(dim=1)
    return key, value
