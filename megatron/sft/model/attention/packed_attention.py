"""Attention over packed rows without Transformer Engine: every conversation attends to itself only."""

import math
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

from megatron.sft.model.attention import flash_attention
from megatron.sft.model.attention.flash_attention import attention_with_sinks, varlen_attention
from megatron.sft.model.inputs import AttentionRuns, PackedRows
from megatron.sft.runtime import device


class PackedAttention(MegatronModule):
    """Causal attention inside each conversation; takes the place of megatron-core's core attention.

    In 16 bits on a GPU one call of flash attention, else scaled_dot_product_attention a conversation. With
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
        flash_attention.check(config.params_dtype, device.current())
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
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            context = self._varlen(query, key, value, runs)
        elif self.softmax_offset is not None:
            context = self._with_sinks(query, key, value, runs)
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
        how = self.softmax_scale, self.window
        if self.softmax_offset is not None:
            return attention_with_sinks(query, key, value, self.softmax_offset, runs, *how)
        return varlen_attention(query, key, value, runs.cu_seqlens, runs.key_cu_seqlens, *longest, *how)


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
