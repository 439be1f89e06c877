"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values made of a token's two short vectors.

megatron-core's MLASelfAttention brings its own rotary positions, without most scalings, and its own configuration.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron.sft.families.architecture import Architecture, LatentConfig
from megatron.sft.model.attention.engine_attention import engine_is_right
from megatron.sft.model.inputs import AttentionRuns, PackedRows
from megatron.sft.model.norm import RMSNorm
from megatron.sft.model.recomputation import recompute
from megatron.sft.model.rotary import rotate
from megatron.sft.runtime import device


class LatentAttention(MegatronModule):
    """Takes the place of a layer's attention: `project`, then `mix`, whose last step is `linear_proj`.

    Tensor parallelism splits it by heads. Every rank holds `linear_down`, the projection to the vectors, and with sequence
    parallelism gives it a part of the tokens: between the ranks go the vectors, which are shorter than the hidden state.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        architecture: Architecture,
        linear: tuple[type, type],
        core_attention: Any,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        """linear: the classes of the column- and the row-parallel layer."""
        super().__init__(config=config)
        assert architecture.latent is not None
        self.sizes = sizes = architecture.latent
        heads, norm = architecture.num_heads, {"config": config, "eps": sizes.norm_epsilon}
        group = parallel_state.get_tensor_model_parallel_group()
        options = {"config": config, "is_expert": False, "tp_group": group}
        column = {
            **options, "init_method": config.init_method, "bias": False, "gather_output": False, "skip_bias_add": False,
            "tp_comm_buffer_name": "qkv",
        }  # fmt: skip
        self.linear_down = ReplicatedLinear(config, config.hidden_size, sizes.down_rows, architecture.qkv_bias)
        if sizes.query_rank:
            self.q_layernorm = RMSNorm(hidden_size=sizes.query_rank, **norm)
        self.linear_q_up = build_module(linear[0], sizes.query_rank or config.hidden_size, heads * sizes.head_dim, **column)
        self.kv_layernorm = RMSNorm(hidden_size=sizes.kv_rank, **norm)
        self.linear_kv_up = build_module(linear[0], sizes.kv_rank, heads * (sizes.nope_dim + sizes.value_dim), **column)
        is_engine = isinstance(core_attention, type)  # Transformer Engine's, else a spec of PackedAttention
        self.padding = _padding(sizes, config.params_dtype, is_engine)
        channels = {"k_channels": sizes.head_dim, "v_channels": sizes.value_dim + self.padding} if is_engine else {}
        self.core_attention = build_module(
            core_attention, config=config, layer_number=layer_number, attn_mask_type=AttnMaskType.causal,
            attention_type="self", softmax_scale=config.softmax_scale, cp_comm_type=cp_comm_type, pg_collection=pg_collection,
            **channels,
        )  # fmt: skip
        self.linear_proj = build_module(
            linear[1], heads * sizes.value_dim, config.hidden_size, init_method=config.output_layer_init_method,
            bias=architecture.output_bias, input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="proj", **options,
        )  # fmt: skip

    def project(self, normed: Tensor) -> tuple[Tensor, ...]:
        """normed [t / TP with sequence parallelism, 1, hidden size] to all that is made of it: what `mix` takes."""
        down = self.linear_down(normed)[0]
        return (down,) if self.sizes.query_rank else (down, self.linear_q_up(normed)[0])

    def mix(
        self, projected: tuple[Tensor, ...], tables: Tensor, packed: PackedRows, again: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(The layer's attention output, its bias), as linear layers return them. tables: see `rotary_tables`.

        again: queries, keys and values are made again from the vectors in the backward pass, as DeepSeek does; they are many
        times as large.
        """
        sizes, runs = self.sizes, packed.runs
        assert runs is not None
        query_vector, shared_key, vector = projected[0].split([sizes.query_rank or 0, sizes.rope_dim, sizes.kv_rank], dim=-1)
        query_input = self.q_layernorm(query_vector) if sizes.query_rank else None
        kv_input = self._of_all_ranks(self.kv_layernorm(vector))
        # Each rank's heads give a part of the gradient of what all keys share.
        group = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            shared_key = tensor_parallel.gather_from_sequence_parallel_region(shared_key, group=group)
        else:
            shared_key = tensor_parallel.copy_to_tensor_model_parallel_region(shared_key, group=group)
        shared_key = self._of_all_ranks(rotate(shared_key, tables))
        query = self._queries(projected[1] if query_input is None else self.linear_q_up(query_input)[0], tables)
        key, value = self._keys_and_values(shared_key, kv_input, runs)
        if self.config.context_parallel_size > 1:
            context = self.core_attention.attend(query, key, value, runs)
        else:
            context = self.core_attention(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
        context = context.reshape(*query.shape[:2], -1)

        def write(keys: Tensor, values: Tensor, *queries: Tensor) -> None:
            with torch.no_grad():
                for target, made in zip((keys, values), self._keys_and_values(shared_key, kv_input, runs), strict=True):
                    target.copy_(made)
                for target in queries:
                    target.copy_(self._queries(self.linear_q_up(query_input)[0], tables))

        if again and self._can_repeat():
            recompute((key, value) if query_input is None else (key, value, query), context, write)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(context[..., : sizes.value_dim].reshape(len(query), 1, -1))
        return output

    def _of_all_ranks(self, tokens: Tensor) -> Tensor:
        """Of the tokens of all context-parallel ranks, one rank after another: vectors, much shorter than keys and values.

        Backward sums what each rank's queries give to a token on the rank that holds it.
        """
        if self.config.context_parallel_size == 1:
            return tokens
        group = parallel_state.get_context_parallel_group()
        gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(tokens, group=group)
        return gathered

    def _queries(self, projected: Tensor, tables: Tensor) -> Tensor:
        """[t, heads, head_dim], their first dimensions rotated."""
        return rotate(projected.view(len(projected), -1, self.sizes.head_dim), tables)

    def _keys_and_values(self, shared_key: Tensor, kv_input: Tensor, runs: AttentionRuns) -> tuple[Tensor, Tensor]:
        """Keys and values as the attention takes them."""
        sizes = self.sizes
        projected = self.linear_kv_up(kv_input)[0].view(len(shared_key), -1, sizes.nope_dim + sizes.value_dim)
        if runs.key_order is not None:
            projected = projected.index_select(0, self._order_after_projection(runs.key_order, len(projected)))
            shared_key = shared_key.index_select(0, runs.key_order)
        key, value = keys_and_values(shared_key, projected, sizes.nope_dim)
        return key, F.pad(value, (0, self.padding))  # a copy in any case, so that the other part of `projected` is freed

    def _order_after_projection(self, order: Tensor, num_tokens: int) -> Tensor:
        """Places of tokens, counted context-parallel rank by rank, where `linear_kv_up` has them.

        With sequence parallelism it gathers the tensor-parallel ranks' parts of what was gathered over context parallelism.
        """
        parts = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        ranks = self.config.context_parallel_size
        size = num_tokens // (parts * ranks)
        places = torch.arange(num_tokens, device=order.device).view(parts, ranks, size).transpose(0, 1).reshape(-1)
        return places[order]

    def _can_repeat(self) -> bool:
        """False where the projections would not give the same again."""
        adapters = (getattr(linear, "adapter", None) for linear in (self.linear_q_up, self.linear_kv_up))
        drawn = any(adapter is not None and adapter.lora.dropout for adapter in adapters)
        return not drawn and not self.config.fp8

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core's description of the weights: those of split linear layers are theirs, the others stand here."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result: dict[str, Any] = {}
        split = ("linear_q_up.", "linear_kv_up.", "linear_proj.")
        for name in split:
            result |= self.get_submodule(name[:-1]).sharded_state_dict(f"{prefix}{name}", sharded_offsets, metadata)
        state = self.state_dict(prefix="", keep_vars=True)
        own = {name: value for name, value in state.items() if name.startswith(("linear_down.", "q_layer", "kv_layer"))}
        group = parallel_state.get_tensor_model_parallel_group()
        whole = make_sharded_tensors_for_checkpoint(
            own, prefix, {}, sharded_offsets, tp_group=group, dp_cp_group=metadata["dp_cp_group"]
        )
        return {**result, **whole}


def _padding(sizes: LatentConfig, dtype: torch.dtype, is_engine: bool) -> int:
    """How many zeros a value gets: kernels for 16 bits have one size for keys and values, but for some of cuDNN's."""
    needed = sizes.head_dim - sizes.value_dim
    if not needed or dtype == torch.float32 or not device.has_gpu():
        return 0
    return 0 if is_engine and engine_is_right(sizes.head_dim, sizes.value_dim, dtype) else needed


class ReplicatedLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole. With sequence parallelism it sees a part of the tokens."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(outputs, dtype=config.params_dtype)) if bias else None
        for parameter in self.parameters():
            # megatron-core sums the gradients of parameters marked this way over TP.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        """(outputs with the bias, None), as megatron-core's linear layers return them."""
        return F.linear(inputs, self.weight, self.bias), None


def keys_and_values(shared_key: Tensor, keys_values: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
    """Keys [t, heads, rotated + nope_dim] and values [t, heads, value_dim].

    shared_key: [t, 1, rotated], rotated. keys_values: [t, heads, nope_dim + value_dim], of each head its own part of the key
    and its value.
    """
    own, value = keys_values.split([nope_dim, keys_values.shape[-1] - nope_dim], dim=-1)
    return torch.cat([shared_key.expand(-1, own.shape[1], -1), own], dim=-1), value
