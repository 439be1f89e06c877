"""Builds the model: the one place that knows megatron-core's GPTModel and how its layers are put together here."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.sft import device
from megatron.sft.attention import PackedAttention
from megatron.sft.batches import MicroBatch
from megatron.sft.families.rope import inverse_frequencies
from megatron.sft.families.rules import Shape
from megatron.sft.layout import Layout, check_layout
from megatron.sft.loss_head import weighted_cross_entropy


def has_transformer_engine() -> bool:
    """True if this process can use Transformer Engine's layers: it has a GPU and megatron-core found the package."""
    if not device.has_gpu():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, made the way megatron-core makes norms and marked for sequence parallelism's gradient sum."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class OutputHead(tensor_parallel.ColumnParallelLinear):
    """The output layer, computing the loss instead of all logits.

    It stays a module of its own because megatron-core waits for a module's gathered parameters when the module is called.
    """

    def forward(self, hidden: Tensor, weight: Tensor, batch: MicroBatch, vocab_size: int, logits: bool) -> Tensor:
        """hidden: [t / TP with sequence parallelism, 1, hidden size]. Returns what `SFTModel.forward` does."""
        if self.sequence_parallel:
            # Each rank's head gives a part of the gradient; the gather's backward sums the parts and scatters.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.squeeze(1)  # [t, hidden]
        if logits:
            local = hidden @ weight.t()
            return tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.tp_group)[:, :vocab_size]
        trained = hidden.index_select(0, batch.targets.positions)  # [n, hidden]
        shared_here = self.weight is None  # tied, and the embedding lies on this stage
        return weighted_cross_entropy(trained, weight, batch.targets, vocab_size, self.tp_group, shared_here)


class SFTModel(GPTModel):
    """A GPTModel that takes a `MicroBatch` and returns the summed loss of its trained tokens (on the last stage)."""

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size
        if self.post_process:
            # GPTModel makes its output layer itself; only what it computes is changed.
            self.output_layer.__class__ = OutputHead

    def forward(self, batch: MicroBatch, logits: bool = False) -> Tensor:
        """The summed loss as a float32 scalar on the last pipeline stage, hidden states [t, 1, hidden] on the others.

        logits=True gives [t, vocabulary] instead of the loss, gathered over TP and without padded rows, for comparisons.
        """
        hidden: Tensor = super().forward(batch.tokens, batch.positions, None, packed_seq_params=batch.packed)
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        result: Tensor = self.output_layer(hidden, weight, batch, self.true_vocab_size, logits)
        return result

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # GPTModel would form all logits here; the head takes the hidden states.
        return hidden_states


def transformer_config(shape: Shape, layout: Layout, params_dtype: torch.dtype, **overrides: Any) -> TransformerConfig:
    """megatron-core's configuration of this architecture in this layout. `overrides` are TransformerConfig's own fields."""
    check_layout(layout, shape)
    stage_layers = layout.stage_layers(shape)
    uneven = len(set(stage_layers)) > 1
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
        pipeline_dtype=params_dtype,
        # Rows differ in length, so stages tell each other the shape.
        variable_seq_lengths=layout.pipeline_parallel > 1,
        moe_token_dispatcher_type="alltoall",
        **_mixture_fields(shape, layout),
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        calculate_per_token_loss=True,
        use_cpu_initialization=not device.has_gpu(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=device.has_gpu() and not has_transformer_engine(),
        use_te_activation_func=has_transformer_engine(),
        apply_rope_fusion=has_transformer_engine(),
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


def build_model(shape: Shape, layout: Layout, config: TransformerConfig) -> SFTModel:
    """This process's part of the model, its parameters not yet set: load a checkpoint or `weights` into it.

    Needs megatron-core's parallel state to have the sizes of `layout`. Under `torch.device("meta")` it takes no memory.
    """
    pre_process = parallel_state.is_pipeline_first_stage()
    post_process = parallel_state.is_pipeline_last_stage()
    model = SFTModel(
        config=config,
        transformer_layer_spec=_layers(config),
        vocab_size=layout.padded_vocab_size(shape),
        max_sequence_length=shape.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
        true_vocab_size=shape.vocab_size,
    )
    _mark_split_parameters(model)
    if shape.rope_scaling is not None:
        # megatron-core knows the scaling of Llama 3.1 at its first values only.
        model.rotary_pos_emb.inv_freq = inverse_frequencies(shape, model.rotary_pos_emb.inv_freq.device)
    for module in model.modules():
        # Transformer Engine's layers add their weight gradients to main_grad inside the GEMM. megatron-core's switch for it
        # would ask for Apex, which only its own layers need.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if isinstance(module, MLP) and isinstance(module.activation_func, torch.nn.Module):
            # Transformer Engine's activation has no weights, which megatron-core asks it for when it saves.
            activation: Any = module.activation_func
            activation.sharded_state_dict = lambda *args, **kwargs: {}
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


def _layers(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    if has_transformer_engine():
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            use_te_activation_func=config.use_te_activation_func,
        )
        if config.params_dtype == torch.float32:
            # Transformer Engine has no packed attention in float32.
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return layer
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts:
        # The name that Transformer Engine's layer gives it: before experts the norm is not part of a linear layer.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
