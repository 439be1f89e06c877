"""How the layers of a stage are put together of megatron-core's parts and this project's: one spec for each layer."""

from functools import cache, partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron.sft.families.architecture import GATED_DELTA_NET, LATENT_ATTENTION, Architecture, Layer, MoEConfig
from megatron.sft.families.weight_names import norm_names
from megatron.sft.model.attention.engine_attention import engine_is_right
from megatron.sft.model.attention.latent_attention import LatentAttention
from megatron.sft.model.attention.packed_attention import PackedAttention
from megatron.sft.model.config import has_transformer_engine
from megatron.sft.model.decoder_layer import DecoderLayer
from megatron.sft.model.delta_net.layer import GatedDeltaNet
from megatron.sft.model.experts.sparse_mlp import SparseMLP
from megatron.sft.model.norm import ResidualNorm, ResidualSum, RMSNorm
from megatron.sft.model.recomputation import recomputed_whole, recomputes_selectively


def stage_layers(architecture: Architecture, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this process's pipeline stage (and chunk of it), and the last norm."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    first = get_transformer_layer_offset(config, vp_stage, rank)
    count = get_num_layers_to_build(config, vp_stage)
    whole, selective = recomputed_whole(config, vp_stage), recomputes_selectively(config)
    kinds = [(kind, selective and index >= whole) for index, kind in enumerate(architecture.layers[first : first + count])]
    specs = {kind: _layer(architecture, config, *kind) for kind in set(kinds)}
    layers = [specs[kind] for kind in kinds]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _layer(architecture: Architecture, config: TransformerConfig, facts: Layer, selective: bool) -> ModuleSpec:
    num_experts = config.num_moe_experts if facts.experts else None
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts, normalization="RMSNorm", qk_layernorm=architecture.query_key_norm is not None
    )
    layer.module, layer.params = DecoderLayer, {"architecture": architecture, "facts": facts, "selective": selective}
    norm = ResidualSum if architecture.norms == "after" else ResidualNorm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.sharded_state_dict_keys_map = norm_names(facts)
    if facts.mixer == GATED_DELTA_NET:
        layer.submodules.self_attention = ModuleSpec(
            module=GatedDeltaNet, params={"sizes": architecture.delta_net, "linear": _linear_layers()}
        )
    elif facts.mixer == LATENT_ATTENTION:
        parts = {"linear": _linear_layers(), "core_attention": _core_attention(architecture, config, facts)}
        layer.submodules.self_attention = ModuleSpec(module=LatentAttention, params={"architecture": architecture, **parts})
    else:
        _set_attention(layer.submodules.self_attention.submodules, architecture, config, facts)
    column, row = _linear_layers()
    if not facts.experts:
        mlp = layer.submodules.mlp  # a ModuleSpec in megatron-core 0.16, a partial in 0.19
        dense = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        dense.linear_fc1, dense.linear_fc2 = with_bias(column, architecture.mlp_bias), with_bias(row, architecture.mlp_bias)
    else:
        assert architecture.moe is not None
        linear = (with_bias(column, False), with_bias(row, False))
        layer.submodules.mlp = _sparse_mlp(architecture.moe, linear, architecture.activation)
    return layer


def _set_attention(attention: Any, architecture: Architecture, config: TransformerConfig, facts: Layer) -> None:
    """Set the submodules of megatron-core's SelfAttention."""
    column, row = _linear_layers()
    attention.linear_qkv = with_bias(column, architecture.qkv_bias)
    attention.linear_proj = with_bias(row, architecture.output_bias)
    attention.core_attention = _core_attention(architecture, config, facts)
    # `DecoderLayer` makes norms over whole projections: megatron-core takes none that its configuration does not have.
    by_head = architecture.query_key_norm in ("head", "rotated head")
    attention.q_layernorm = attention.k_layernorm = RMSNorm if by_head else None


def _core_attention(architecture: Architecture, config: TransformerConfig, facts: Layer) -> Any:
    """Attention itself over packed rows: Transformer Engine's where it can, else this project's, with its layer's window."""
    # It has no packed attention in float32 or with sinks, nor, on a part of the row, a window or values of another size than
    # keys.
    whole_rows = config.context_parallel_size == 1 or (facts.window is None and facts.mixer != LATENT_ATTENTION)
    possible = config.params_dtype != torch.float32 and not architecture.attention_sinks
    if has_transformer_engine() and possible and whole_rows and _engine_is_right(architecture, config, facts):
        from megatron.core.extensions import transformer_engine as engine

        return engine.TEDotProductAttention
    return ModuleSpec(module=PackedAttention, params={"window": facts.window, "sinks": architecture.attention_sinks})


def _engine_is_right(architecture: Architecture, config: TransformerConfig, facts: Layer) -> bool:
    if facts.mixer != LATENT_ATTENTION:
        return engine_is_right(architecture.head_dim, architecture.head_dim, config.params_dtype)
    assert architecture.latent is not None
    keys, values = architecture.latent.head_dim, architecture.latent.value_dim
    # Values may be padded to the size of keys.
    return engine_is_right(keys, values, config.params_dtype) or engine_is_right(keys, keys, config.params_dtype)


def _linear_layers() -> tuple[type, type]:
    """The classes of column- and row-parallel layers."""
    if has_transformer_engine():
        from megatron.core.extensions import transformer_engine as engine

        return engine.TEColumnParallelLinear, engine.TERowParallelLinear
    return tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear


@cache
def _sparse_mlp(moe: MoEConfig, linear: tuple[type, type], activation: str) -> type:
    """The class of these mixtures: megatron-core passes a class its configuration alone, and warns of other specs."""

    class Mixture(SparseMLP):
        def __init__(self, config: TransformerConfig, **_: Any) -> None:
            super().__init__(config, moe, linear, activation)

    return Mixture


@cache
def with_bias(linear: type, bias: bool) -> type:
    """The class of linear layers with or without a bias, whatever megatron-core asks for: it has one switch for all."""

    class Layer(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": bias})

    Layer.__name__ = Layer.__qualname__ = linear.__name__
    return Layer
