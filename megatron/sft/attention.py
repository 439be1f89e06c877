"""Attention over packed rows without Transformer Engine: every conversation attends to itself only."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(MegatronModule):
    """Causal attention inside each conversation; takes the place of megatron-core's core attention.

    In 16 bits on a GPU one variable-length flash attention call, else scaled_dot_product_attention a conversation.
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
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("context parallelism needs Transformer Engine")
        # (tokens before the own one, 0); -1 before it means all.
        self.window = config.window_size or (-1, 0)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        """query [t, heads, dim], key and value [t, kv heads, dim] to [t, heads * dim], t all tokens of the micro-batch."""
        assert packed_seq_params is not None, "rows are always packed"
        # Flash attention computes in 16 bits only.
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            context = self._varlen(query, key, value, packed_seq_params)
        else:
            context = self._by_conversation(query, key, value, packed_seq_params)
        return context.reshape(query.shape[0], -1)

    def _by_conversation(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        borders = packed.cu_seqlens_q
        lengths = (borders[1:] - borders[:-1]).tolist()
        contexts = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            context = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],  # [1, heads, length, dim]
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                **self._mask(len(q), q.device),
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            contexts.append(context[0].transpose(0, 1))
        return torch.cat(contexts)

    def _mask(self, length: int, device: torch.device) -> dict[str, Any]:
        """Causal, and with a window no further back than it reaches. The mask is [length, length], True where seen."""
        before = self.window[0]
        if before < 0 or length <= before + 1:
            return {"is_causal": True}
        positions = torch.arange(length, device=device)
        distance = positions[:, None] - positions
        return {"attn_mask": (distance >= 0) & (distance <= before)}

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        borders, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        context = varlen_attn(
            query, key, value, borders, borders, longest, longest, scale=self.softmax_scale, window_size=self.window
        )
        assert isinstance(context, Tensor)
        return context
