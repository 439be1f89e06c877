"""Builds the model: the one place that knows megatron-core's GPTModel and how its layers are put together here."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.sft import device
from megatron.sft.attention import PackedAttention
from megatron.sft.batches import MicroBatch
from megatron.sft.decoder_layer import DecoderLayer
from megatron.sft.embedding import TokenEmbedding
from megatron.sft.families.rope import inverse_frequencies
from megatron.sft.families.rules import Shape
from megatron.sft.layout import Layout, check_layout
from megatron.sft.loss_head import weighted_cross_entropy
from megatron.sft.norm import ResidualNorm, RMSNorm
from megatron.sft.rotary import rotary_tables
from megatron.sft.weight_gradient import use_in_linear_layers


def has_transformer_engine() -> bool:
    """True if this process uses Transformer Engine's layers: it has a GPU and megatron-core found the package.

    MEGATRON_SFT_TE=0 in the environment does without it, to compare.
    """
    if not device.has_gpu() or os.environ.get("MEGATRON_SFT_TE") == "0":
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def describe_kernels(precision: str) -> str:
    """What this process computes with, for the log, and what would be faster."""
    if not device.has_gpu():
        return "torch on the CPU"
    own = "Triton kernels for norms, SwiGLU, rotary positions and loss"
    if has_transformer_engine():
        import transformer_engine

        attention = "torch's attention, conversation by conversation" if precision == "fp32" else "its packed attention"
        return f"Transformer Engine {getattr(transformer_engine, '__version__', '')}: linear layers, {attention}, AdamW; {own}"
    attention = "scaled_dot_product_attention, conversation by conversation" if precision == "fp32" else "varlen_attn"
    return (
        f"torch {torch.__version__}: linear layers, {attention}, fused AdamW; {own}. "
        "Transformer Engine is not installed: with it bf16 is faster, and fp8 possible"
    )


class OutputHead(tensor_parallel.ColumnParallelLinear):
    """The output layer, computing the loss instead of all logits.

    It stays a module of its own because megatron-core waits for a module's gathered parameters when the module is called.
    """

    def forward(
        self, hidden: Tensor, weight: Tensor, batch: MicroBatch, vocab_size: int, logits: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden: [t / TP with sequence parallelism, 1, hidden size]. Returns what `SFTModel.forward` does."""
        if self.sequence_parallel:
            # Each rank's head gives a part of the gradient; the gather's backward sums the parts and scatters.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.squeeze(1)  # [t, hidden]
        if logits:
            local = hidden @ weight.t()
            whole: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.tp_group)
            return whole[:, :vocab_size]
        trained = hidden.index_select(0, batch.targets.positions)  # [n, hidden]
        shared_here = self.weight is None  # tied, and the embedding lies on this stage
        # What the backward pass will start with: the weight's gradient is made before.
        scale = batch.gradient_scale
        if self.config.fp16:
            scale = self.config.grad_scale_func(torch.ones((), device=hidden.device) if scale is None else scale)
        return weighted_cross_entropy(trained, weight, batch.targets, vocab_size, self.tp_group, shared_here, scale)


class SFTModel(GPTModel):
    """A GPTModel that takes a `MicroBatch` and returns the summed loss of its trained tokens (on the last stage)."""

    def __init__(self, *args: Any, shape: Shape, **kwargs: Any) -> None:
        # megatron-core's own rotary positions know Llama 3.1's scaling at its first values only.
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.true_vocab_size = shape.vocab_size
        # No buffer: Float16Module would round it.
        self.inverse_frequencies = inverse_frequencies(shape, device.current())
        if self.post_process:
            # GPTModel makes its output layer itself; only what it computes is changed.
            self.output_layer.__class__ = OutputHead

    def forward(self, batch: MicroBatch, logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """On the last pipeline stage the summed loss and each trained token's (`weighted_cross_entropy`), on the others hidden
        states [t, 1, hidden].

        logits=True gives [t, vocabulary] instead of the loss, gathered over TP and without padded rows, for comparisons.
        """
        hidden: Tensor = super().forward(batch.tokens, batch.positions, None, packed_seq_params=batch.packed)
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        result: Tensor | tuple[Tensor, Tensor] = self.output_layer(hidden, weight, batch, self.true_vocab_size, logits)
        return result

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        return decoder_input, rotary_tables(position_ids[0], self.inverse_frequencies), *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # GPTModel would form all logits here; the head takes the hidden states.
        return hidden_states


def transformer_config(shape: Shape, layout: Layout, params_dtype: torch.dtype, **overrides: Any) -> TransformerConfig:
    """megatron-core's configuration of this architecture in this layout. `overrides` are TransformerConfig's own fields."""
    check_layout(layout, shape)
    stage_layers = layout.stage_layers(shape)
    uneven = len(set(stage_layers)) > 1
    accumulate = device.has_gpu() and not has_transformer_engine()
    if accumulate:
        use_in_linear_layers()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        # megatron-core counts the tokens before the own one.
        window_size=(shape.sliding_window - 1, 0) if shape.sliding_window else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        context_parallel_size=layout.context_parallel,
        sequence_parallel=layout.sequence_parallel,
        num_layers_in_first_pipeline_stage=stage_layers[0] if uneven else None,
        num_layers_in_last_pipeline_stage=stage_layers[-1] if uneven else None,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        # Between two stages only megatron-core's single transfers keep the two directions of interleaved chunks apart.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        batch_p2p_sync=False,
        pipeline_dtype=params_dtype,
        # Rows differ in length (see `pipeline.RowPipeline`).
        variable_seq_lengths=layout.pipeline_parallel > 1,
        moe_token_dispatcher_type="alltoall",
        **_mixture_fields(shape, layout),
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        calculate_per_token_loss=True,
        use_cpu_initialization=not device.has_gpu(),
        perform_initialization=False,
        # Transformer Engine's layers do it by a switch of their own (build_model).
        gradient_accumulation_fusion=accumulate,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        **overrides,
    )


def _mixture_fields(shape: Shape, layout: Layout) -> dict[str, Any]:
    mixture = shape.mixture
    if mixture is None:
        return {}
    if not hasattr(moe_utils, "te_general_gemm"):
        # Without Transformer Engine the router looks for a name that megatron-core then forgot to define.
        moe_utils.te_general_gemm = None
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_ffn_hidden_size": mixture.ffn_hidden_size,
        "moe_router_topk": mixture.experts_per_token,
        # Softmax over the chosen experts' scores alone makes their weights sum to 1.
        "moe_router_pre_softmax": not mixture.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": has_transformer_engine(),
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
    }


def build_model(shape: Shape, layout: Layout, config: TransformerConfig, chunk: int = 0) -> SFTModel:
    """This process's part of the model, its parameters not yet set: load a checkpoint or `weights` into it.

    chunk: which one, where the layout puts several on each pipeline stage. Needs megatron-core's parallel state to have the
    sizes of `layout`. Under `torch.device("meta")` it takes no memory.
    """
    vp_stage = chunk if layout.virtual_pipeline > 1 else None
    pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    model = SFTModel(
        config=config,
        transformer_layer_spec=_layers(config, vp_stage),
        vocab_size=layout.padded_vocab_size(shape),
        max_sequence_length=shape.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        vp_stage=vp_stage,
        shape=shape,
    )
    _mark_split_parameters(model)
    for module in model.modules():
        # Transformer Engine's layers add their weight gradients to main_grad inside the GEMM. megatron-core's switch for it
        # would ask for Apex, which only its own layers need.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if isinstance(module, VocabParallelEmbedding):
            module.__class__ = TokenEmbedding
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return model if on_meta else model.to(device.current())


def _mark_split_parameters(model: torch.nn.Module) -> None:
    """Mark the parameters that TP splits, which megatron-core's own layers do only when they initialise their weights.

    Without the marks the gradient norm would count the first TP rank's part alone.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dimension = 0
        elif isinstance(module, RowParallelLinear):
            dimension = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)


def _layers(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.module = DecoderLayer
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = ResidualNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm if config.qk_layernorm else None
    if has_transformer_engine():
        from megatron.core.extensions import transformer_engine as engine

        attention.linear_qkv, attention.linear_proj = engine.TEColumnParallelLinear, engine.TERowParallelLinear
        windowed_part = config.context_parallel_size > 1 and config.window_size is not None
        if config.params_dtype != torch.float32 and not windowed_part:
            # It has no packed attention in float32, nor a window on a part of the row.
            attention.core_attention = engine.TEDotProductAttention
        if not config.num_moe_experts:
            dense = layer.submodules.mlp.submodules
            dense.linear_fc1, dense.linear_fc2 = engine.TEColumnParallelLinear, engine.TERowParallelLinear
    if config.num_moe_experts:
        # The name that Transformer Engine's layer gives it: before experts the norm is not part of a linear layer.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        if has_transformer_engine():
            layer.submodules.mlp = get_moe_module_spec(
                use_te=True, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
            )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )
