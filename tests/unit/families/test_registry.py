"""Architectures read from configurations, and layouts that they allow."""

import pytest
import torch

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.registry import FAMILIES, family_rules, read_architecture
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.runtime.errors import UserError

CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
}
MIXTURE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_intermediate_size": 6, "shared_expert_intermediate_size": 8,
}  # fmt: skip


LATENT = {"q_lora_rank": 6, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


def _config(family: str) -> dict[str, object]:
    if family in ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"):
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
        return {**CONFIG, "model_type": family, **LATENT, **experts, "num_key_value_heads": 4, "n_shared_experts": 1}
    used = getattr(FAMILIES[family], "USED", ())
    mixture = {} if family == "qwen3_5_text" else {name: size for name, size in MIXTURE.items() if name in used}
    if "qwen3_5" in family or "qwen3_next" in family:
        delta_net = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
        mixture |= {"head_dim": 8, "full_attention_interval": 2, **delta_net}
    if family == "glm4_moe":
        mixture["head_dim"] = 8
    return {**CONFIG, "model_type": family, **mixture}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_its_table_both_ways(family: str) -> None:
    architecture = read_architecture(_config(family), "config.json")
    for rule in family_rules(architecture):
        tensors = [torch.randn(_hf_shape(name, architecture)) for name in rule.hf]
        back = rule.to_hf(architecture, rule.to_megatron(architecture, *tensors))
        assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True)), rule.megatron


def _hf_shape(name: str, architecture: Architecture) -> tuple[int, ...]:
    query, key = architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    if architecture.latent and ("self_attn" in name or "correction_bias" in name):
        return _latent_shape(name)
    if "linear_attn" in name:
        return _delta_net_shape(name, architecture)
    query *= 2 if architecture.attention_gate else 1
    rows = {"qkv_proj": query + 2 * key, "gate_up_proj": 2 * ffn}
    rows |= {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": ffn, "up_proj": ffn, ".w1.": ffn, ".w3.": ffn}
    for part, size in rows.items():
        if part in name:
            return (size,) if name.endswith("bias") else (size, hidden)
    if "moe_statics" in name:
        return (1, hidden)
    return (hidden,) if "norm" in name or name.endswith("bias") else (hidden, hidden)


def _latent_shape(name: str) -> tuple[int, ...]:
    """With the sizes of LATENT, 4 heads, 4 experts and a hidden size of 24."""
    shapes: dict[str, tuple[int, ...]] = {"q_a_proj": (6, 24), "q_b_proj": (48, 6), "kv_a_proj_with_mqa": (14, 24)}
    shapes |= {"q_a_layernorm": (6,), "kv_a_layernorm": (10,), "kv_b_proj": (56, 10), "o_proj": (24, 24), "e_score": (4,)}
    return next(shape for part, shape in shapes.items() if f".{part}" in name)


def _delta_net_shape(name: str, architecture: Architecture) -> tuple[int, ...]:
    sizes, hidden = architecture.delta_net, architecture.hidden_size
    assert sizes is not None
    keys, values = sizes.num_key_heads * sizes.key_dim, sizes.num_value_heads * sizes.value_dim
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj_qkvz": (2 * keys + 2 * values, hidden),
        "in_proj_qkv": (2 * keys + values, hidden),
        "in_proj_z": (values, hidden),
        "in_proj_ba": (2 * sizes.num_value_heads, hidden),
        "in_proj_b": (sizes.num_value_heads, hidden),
        "in_proj_a": (sizes.num_value_heads, hidden),
        "conv1d": (2 * keys + values, 1, sizes.kernel),
        "out_proj": (hidden, values),
        "norm": (sizes.value_dim,),
    }
    return next((shape for part, shape in shapes.items() if f".{part}." in name), (sizes.num_value_heads,))


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = {
    "model_type 'gpt2' is not supported: config.json names nothing unusual, but a table": {"model_type": "gpt2"},
    "choose one of deepseek_v2, deepseek_v3, ernie4_5": {"model_type": "gpt2"},
    "it needs experts, biases, attention sinks and a router with sigmoid scores or correction biases, which exist here; a": {
        "model_type": "mimo_v2_flash",
        "num_local_experts": 4,
        "attention_bias": True,
        "scoring_func": "sigmoid",
    },
    "it needs multi-head latent attention, which exists here, and sparse attention with an indexer, which does not": {
        "model_type": "deepseek_v32",
        "kv_lora_rank": 512,
        "index_topk": 2048,
    },
    "model_type None is not supported": {"model_type": None},
    "hidden_act='gelu' is not supported for qwen2 (only 'silu')": {"hidden_act": "gelu"},
    "use_sliding_window=True is not supported": {"use_sliding_window": True},
    "RoPE scaling of type 'stretch' is not supported: choose one of default": {"rope_scaling": {"rope_type": "stretch"}},
    "RoPE scaling of type 'linear' lacks factor": {"rope_scaling": {"type": "linear"}},
    "RoPE scaling with factor 0.5": {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
    "longrope has 1 short and 3 long factors, a head has 3 rotated pairs": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0]}
    },
    "lacks original_max_position_embeddings": {"model_type": "llama", "rope_scaling": _LLAMA3},
    "the RoPE parameter stretch=1 is not supported": {"rope_scaling": {"rope_type": "default", "stretch": 1}},
    "partial_rotary_factor=0.5 is not supported": {"partial_rotary_factor": 0.5},
    "attention_bias=True is not supported for qwen3": {"model_type": "qwen3", "attention_bias": True},
    "attention_dropout=0.1 is not supported": {"attention_dropout": 0.1},
    "layer_types with other than 'full_attention'": {"layer_types": ["full_attention", "sliding_attention"]},
    "logit_scale=16.0 is not supported: it is not known for qwen2": {"logit_scale": 16.0},
    "the weights are quantised": {"quantization_config": {"bits": 4}},
    "auto_map={'AutoModel': 'modeling.Model'} is not supported": {"auto_map": {"AutoModel": "modeling.Model"}},
    "dtype 'float64' is not supported": {"dtype": "float64"},
    "num_layers is 0": {"num_hidden_layers": 0},
    "a field has a value of the wrong kind": {"hidden_size": "wide"},
    "4 attention heads cannot share 3 KV heads": {"num_key_value_heads": 3},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_built_is_refused_by_name(reason: str) -> None:
    with pytest.raises(UserError) as error:
        read_architecture({**CONFIG, **REFUSED[reason]}, "model/config.json")
    assert str(error.value).startswith("model/config.json: ") and reason in str(error.value)


# Fields that released models have besides those that transformers writes for a tiny one.
RELEASED = {
    "qwen2": {"use_mrope": False, "sliding_window": 4096, "max_window_layers": 21, "_name_or_path": "x"},
    "llama": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {}}},
    "mistral": {"sliding_window": 8, "torch_dtype": "bfloat16", "bos_token_id": 1},
}


@pytest.mark.parametrize("family", RELEASED)
def test_fields_of_released_models_are_understood(family: str) -> None:
    architecture = read_architecture({**CONFIG, "model_type": family, **RELEASED[family]}, "")
    assert {layer.window for layer in architecture.layers} == {8 if family == "mistral" else None}


def test_old_and_new_spellings_of_a_configuration_are_read_alike() -> None:
    old = read_architecture({**CONFIG, "rope_theta": 1e6, "torch_dtype": "bfloat16"}, "")
    new = read_architecture({**CONFIG, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}, "")
    assert old == new and old.ropes[0].theta == 1e6 and old.torch_dtype == torch.bfloat16


def test_uneven_pipelines_hold_every_layer() -> None:
    for num_layers in range(1, 40):
        architecture = read_architecture({**CONFIG, "num_hidden_layers": num_layers}, "")
        for stages in range(1, min(num_layers, 9) + 1):
            layers = Layout(pipeline_parallel=stages).stage_layers(architecture)
            assert sum(layers) == num_layers and len(layers) == stages and min(layers) >= 1
            assert len(set(layers[1:-1])) <= 1


def test_a_layout_that_cannot_be_names_the_choices() -> None:
    architecture = read_architecture(CONFIG, "")
    with pytest.raises(UserError, match=r"TP=4 does not divide the model's 2 KV heads: choose TP from 1, 2"):
        check_layout(Layout(tensor_parallel=4), architecture)
    with pytest.raises(UserError, match=r"PP=3 is more than the model's 2 layers"):
        check_layout(Layout(pipeline_parallel=3), architecture)
    experts = read_architecture(_config("mixtral"), "")
    with pytest.raises(UserError, match=r"EP=3 does not divide the model's 4 experts: choose EP from 1, 2, 4"):
        check_layout(Layout(expert_parallel=3), experts)
    with pytest.raises(UserError, match=r"EP=2 does not divide the model's 1 experts"):
        check_layout(Layout(expert_parallel=2), architecture)


def test_gated_delta_nets_are_split_by_key_heads_and_not_over_contexts() -> None:
    architecture = read_architecture({**_config("qwen3_5_text"), "linear_num_key_heads": 3, "linear_num_value_heads": 6}, "")
    with pytest.raises(UserError, match=r"TP=2 does not divide the model's 3 key heads of gated delta nets: choose TP from 1"):
        check_layout(Layout(tensor_parallel=2), architecture)
    with pytest.raises(UserError, match=r"CP=2 is not possible with the gated delta nets of qwen3_5_text"):
        check_layout(Layout(context_parallel=2), architecture)


def test_dense_layers_of_a_mixture_are_those_between_its_steps_and_those_named() -> None:
    config = {**CONFIG, **MIXTURE, "model_type": "qwen3_moe", "num_hidden_layers": 6, "head_dim": 6}
    config = {name: value for name, value in config.items() if name not in ("n_routed_experts", "moe_num_experts", "moe_k")}
    config = {**config, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    del config["shared_expert_intermediate_size"]
    assert [layer.experts for layer in read_architecture(config, "it").layers] == [False, True, False, False, False, True]
    with pytest.raises(UserError, match="decoder_sparse_step=0"):
        read_architecture({**config, "decoder_sparse_step": 0}, "it")
