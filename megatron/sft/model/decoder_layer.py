"""The decoder layer: megatron-core's parallel linear layers, attention and experts, with this project's fused steps between.

One forward pass for every device and every linear layer (Transformer Engine's or megatron-core's own).
"""

from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.sft.model.experts.sparse_mlp import SparseMLP
from megatron.sft.model.recomputation import recompute
from megatron.sft.model.rotary import rotate, split_and_rotate, split_heads
from megatron.sft.model.swiglu import swiglu, write_swiglu


class DecoderLayer(TransformerLayer):
    """Attention and MLP (or experts), each after a norm and added to the residual."""

    def forward(
        self, hidden_states: Tensor, *_: Any, rotary_pos_emb: Tensor, packed_seq_params: PackedSeqParams, **__: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [t / TP with sequence parallelism, 1, hidden size] to the same.

        rotary_pos_emb: `rotary_tables` of the micro-batch, for all its t tokens (on this context-parallel rank).
        """
        again = self.training and torch.is_grad_enabled() and self.config.recompute_granularity == "selective"
        residual, normed = self.input_layernorm(hidden_states)
        qkv, _ = self.self_attention.linear_qkv(normed)  # [t, 1, groups * (heads / groups + 2) * head_dim]
        if again:
            recompute(normed, qkv, partial(self.input_layernorm.write, residual.detach()))
        attended = self._attend(qkv.squeeze(1), rotary_pos_emb, packed_seq_params)
        residual, normed = self.pre_mlp_layernorm(residual, attended)
        if isinstance(self.mlp, SparseMLP):
            output, _ = self.mlp(normed)
            return residual + output, None
        gate_up, _ = self.mlp.linear_fc1(normed)
        active = swiglu(gate_up)
        output, _ = self.mlp.linear_fc2(active)
        if again:
            recompute(normed, gate_up, partial(self.pre_mlp_layernorm.write, residual.detach()))
            recompute(active, output, partial(write_swiglu, gate_up.detach()))
        return residual + output, None

    def _attend(self, qkv: Tensor, tables: Tensor, packed: PackedSeqParams) -> Tensor:
        attention = self.self_attention
        num_groups, head_dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        if attention.q_layernorm is None:
            query, key, value = split_and_rotate(qkv, tables, num_groups, head_dim)
        else:
            query, key, value = split_heads(qkv, num_groups, head_dim)
            query = rotate(attention.q_layernorm(query), tables)
            key = rotate(attention.k_layernorm(key), tables)
            value = value.contiguous()
        context = attention.core_attention(
            query, key, value, None, attn_mask_type=attention.attn_mask_type, packed_seq_params=packed
        )
        output, _ = attention.linear_proj(context.reshape(context.shape[0], 1, -1))
        return output
