"""The decoder layer: megatron-core's parallel linear layers, attention and experts, with this project's fused steps between.

One forward pass for every device and every linear layer (Transformer Engine's or megatron-core's own).
"""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.sft.families.architecture import ATTENTION, GATED_DELTA_NET, LATENT_ATTENTION, Architecture, Layer
from megatron.sft.model.experts.sparse_mlp import SparseMLP
from megatron.sft.model.inputs import PackedRows
from megatron.sft.model.norm import ProjectionNorm, RMSNorm
from megatron.sft.model.recomputation import recompute
from megatron.sft.model.rotary import rotate, split_and_rotate, split_heads, tables_of
from megatron.sft.model.swiglu import gated_mlp, output_gate


class DecoderLayer(TransformerLayer):
    """Attention (or a gated delta net) and MLP (or experts), each normed before, after or both, and added to the residual."""

    def __init__(self, *args: Any, architecture: Architecture, facts: Layer, selective: bool, **kwargs: Any) -> None:
        """selective: whether norms and activation functions are recomputed in the backward pass."""
        super().__init__(*args, **kwargs)
        self.facts, self.architecture, self.selective = facts, architecture, selective
        self.rope_index = architecture.ropes.index(facts.rope) if facts.rope else None
        if architecture.norms != "before":
            size, eps = self.config.hidden_size, self.config.layernorm_epsilon
            self.post_attention_layernorm = RMSNorm(self.config, size, eps)
            self.post_mlp_layernorm = RMSNorm(self.config, size, eps)
        if architecture.query_key_norm == "projection" and facts.mixer != GATED_DELTA_NET:
            head_dim, eps = architecture.head_dim, self.config.layernorm_epsilon
            self.self_attention.q_layernorm = ProjectionNorm(self.config, head_dim, architecture.num_heads, eps)
            self.self_attention.k_layernorm = ProjectionNorm(self.config, head_dim, architecture.num_kv_heads, eps)
        if selective and self.config.fp8:
            self._keep_16_bit_inputs()

    def _keep_16_bit_inputs(self) -> None:
        """Have Transformer Engine keep the inputs that are freed and filled again; it would keep 8-bit copies of them."""
        from megatron.core.extensions.transformer_engine import set_save_original_input

        if self.architecture.norms != "after":
            for projection in self._projections:
                set_save_original_input(projection)
        if not isinstance(self.mlp, SparseMLP):
            if self.architecture.norms != "after":
                set_save_original_input(self.mlp.linear_fc1)
            set_save_original_input(self.mlp.linear_fc2)
        elif self.mlp.shared_experts is not None:
            set_save_original_input(self.mlp.shared_experts.linear_fc2)

    def forward(
        self, hidden_states: Tensor, *_: Any, rotary_pos_emb: Tensor, packed_seq_params: PackedRows, **__: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [t / TP with sequence parallelism, 1, hidden size] to the same.

        rotary_pos_emb: tables of the micro-batch for all its t tokens (on this context-parallel rank), for each of the
        architecture's `ropes` (see `SFTModel`).
        """
        again = self.training and torch.is_grad_enabled() and self.selective
        # Where nothing is normed before, the layers' inputs are the residual itself.
        norms_again = again and self.architecture.norms != "after"
        residual, normed = self.input_layernorm(hidden_states)
        # [t, 1, groups * (heads / groups + 2) * head_dim], or what a gated delta net starts from
        projected = self._project(normed)
        if norms_again:
            recompute(normed, projected, partial(self.input_layernorm.write, residual.detach()))
        attended = self._after(self._mix(projected, rotary_pos_emb, packed_seq_params, again), "post_attention_layernorm")
        del projected  # the MLP needs its memory
        residual, normed = self.pre_mlp_layernorm(residual, attended)
        if isinstance(self.mlp, SparseMLP):
            output, _ = self.mlp(normed, packed_seq_params, again)
            return residual + self._after((output, None), "post_mlp_layernorm"), None
        write = partial(self.pre_mlp_layernorm.write, residual.detach()) if norms_again else None
        output_and_bias = gated_mlp(self.mlp, normed, self.architecture.activation, again, write)
        return residual + self._after(output_and_bias, "post_mlp_layernorm"), None

    @property
    def _projections(self) -> list[Any]:
        """The split linear layers that take the normed hidden state."""
        names = {GATED_DELTA_NET: ["in_proj"], ATTENTION: ["linear_qkv"], LATENT_ATTENTION: []}[self.facts.mixer]
        if self.facts.mixer == LATENT_ATTENTION and not self.self_attention.sizes.query_rank:
            names = ["linear_q_up"]
        return [getattr(self.self_attention, name) for name in names]

    def _project(self, normed: Tensor) -> tuple[Tensor, ...]:
        """All that attention or a gated delta net makes of the normed hidden state: several with latent attention."""
        if self.facts.mixer == LATENT_ATTENTION:
            vectors: tuple[Tensor, ...] = self.self_attention.project(normed)
            return vectors
        return (self._projections[0](normed)[0],)

    def _after(self, output_and_bias: tuple[Tensor, Tensor | None], norm: str) -> Tensor:
        """What a sub-layer's output becomes before it is added to the residual."""
        output, bias = output_and_bias
        if bias is not None:
            output = output + bias
        if self.architecture.norms != "before":
            output = getattr(self, norm)(output)
        scale = self.architecture.residual_scale
        return output if scale == 1.0 else output * scale

    def _mix(self, made: tuple[Tensor, ...], tables: Tensor, packed: PackedRows, again: bool) -> tuple[Tensor, Tensor | None]:
        """Attention or gated delta net, with its output projection: (output, its bias). made: by `_project`."""
        mixed: tuple[Tensor, Tensor | None]
        if self.facts.mixer == GATED_DELTA_NET:
            assert packed.runs is not None
            mixed = self.self_attention.mix(made[0], packed.runs)
            return mixed
        if self.facts.mixer == LATENT_ATTENTION:
            mixed = self.self_attention.mix(made, tables, packed, again)
            return mixed
        if self.rope_index is not None and len(self.architecture.ropes) > 1:
            tables = tables[self.rope_index]
        attention = self.self_attention
        query, key, value, gates = self._heads(made[0].squeeze(1), None if self.rope_index is None else tables)
        context = attention.core_attention(
            query, key, value, None, attn_mask_type=attention.attn_mask_type, packed_seq_params=packed
        )
        context = context.reshape(context.shape[0], -1)
        if gates is not None:
            context = output_gate(context, gates)
        result: tuple[Tensor, Tensor | None] = attention.linear_proj(context[:, None])
        return result

    def _heads(self, qkv: Tensor, tables: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values [t, heads, dim], normed and rotated as the architecture has it, and the output's gates."""
        attention = self.self_attention
        num_groups, head_dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        norms = self.architecture.query_key_norm
        if norms is None and tables is not None and not self.architecture.attention_gate:
            return *split_and_rotate(qkv, tables, num_groups, head_dim), None
        num_queries = attention.num_attention_heads_per_partition // num_groups
        query, gates, key, value = split_heads(qkv, num_groups, head_dim, num_queries)
        heads = {"q": query, "k": key}
        rotated = norms == "rotated head"
        for letter, module in (("q", attention.q_layernorm), ("k", attention.k_layernorm)):
            normed = heads[letter] if norms is None or rotated else module(heads[letter])
            turned = normed if tables is None else rotate(normed, tables_of(tables, letter == "q"))
            heads[letter] = module(turned) if rotated else turned.contiguous()
        return heads["q"], heads["k"], value.contiguous(), gates
