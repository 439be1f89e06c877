"""The table of weights of a decoder: which Megatron parameter holds which Hugging Face tensors, from the pieces it is made of.

A family's table may give other names than those in `NAMES`.
"""

from megatron.sft.families.architecture import ATTENTION, GATED_DELTA_NET, LATENT_ATTENTION, Architecture, Layer
from megatron.sft.families.latent_rules import RotatedRows
from megatron.sft.families.rules import QKV, Buffer, FusedQKV, GateUp, GroupedRows, InterleavedGateUp, Rename, Rule, Transposed

# Modules of a layer on Hugging Face's side, as Llama, Qwen and OLMo have them. `qkv`, `gate_up`: one tensor for several
# projections, where a family has one. `block`: where experts lie. `expert_…`: the matrices of one, or `expert_fused` the two
# of all of them, [experts, inputs, outputs] with gate and up in turn. `router` to `shared_gate`: other modules there, and
# `correction_bias`, a tensor, [1, experts] if its name ends so; `fused_…` is where transformers 5 itself has it, if elsewhere.
NAMES = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "qkv": "",
    "gate_up": "",
    "block": "mlp",
    "expert_gate": "gate_proj",
    "expert_up": "up_proj",
    "expert_down": "down_proj",
    "expert_fused": "",
    "router": "gate",
    "correction_bias": "gate.e_score_correction_bias",
    "fused_correction_bias": "",
    "shared": "shared_experts",
    "shared_gate": "shared_expert_gate",
    "delta_input": "in_proj_qkv in_proj_z in_proj_b in_proj_a",
}
_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def outer(architecture: Architecture) -> tuple[Rule, ...]:
    """Embedding, last norm and, unless it is tied to the embedding, the output layer."""
    rules: tuple[Rule, ...] = (
        Rename("embedding.word_embeddings.weight", "model.embed_tokens.weight", tp_dim=0),
        Rename("decoder.final_layernorm.weight", "model.norm.weight"),
    )
    return rules if architecture.tied_embeddings else (*rules, Rename("output_layer.weight", "lm_head.weight", tp_dim=0))


def of_layer(architecture: Architecture, layer: Layer, names: dict[str, str]) -> tuple[Rule, ...]:
    """A layer's table. `names`: as NAMES."""
    mixer = _MIXERS[layer.mixer]
    block = _experts if layer.experts else _mlp
    rules = (*mixer(architecture, names), *block(architecture, names))
    if architecture.norms == "before":
        return rules
    for ours, name in (("post_attention_layernorm", "attention_output_norm"), ("post_mlp_layernorm", "mlp_output_norm")):
        rules += (Rename(f"{_MEGATRON}{ours}.weight", f"{_HF}{names[name]}.weight"),)
    return rules


def _norm_before(architecture: Architecture, ours: str, name: str) -> tuple[Rule, ...]:
    return () if architecture.norms == "after" else (Rename(f"{_MEGATRON}{ours}", f"{_HF}{name}.weight"),)


def _attention(architecture: Architecture, names: dict[str, str]) -> tuple[Rule, ...]:
    """A layer's attention with its norm, under megatron-core's name for a norm that is fused with linear_qkv."""
    ours, theirs = f"{_MEGATRON}self_attention.", f"{_HF}self_attn."

    def qkv(kind: str) -> Rule:
        if names["qkv"]:
            return FusedQKV(f"{ours}linear_qkv.{kind}", f"{theirs}{names['qkv']}.{kind}")
        return QKV(f"{ours}linear_qkv.{kind}", f"{theirs}q_proj.{kind}", f"{theirs}k_proj.{kind}", f"{theirs}v_proj.{kind}")

    rules: tuple[Rule, ...] = (
        *_norm_before(architecture, "self_attention.linear_qkv.layer_norm_weight", names["input_norm"]),
        qkv("weight"),
        Rename(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", tp_dim=1),
    )
    if architecture.qkv_bias:
        rules += (qkv("bias"),)
    if architecture.output_bias:
        rules += (Rename(f"{ours}linear_proj.bias", f"{theirs}o_proj.bias"),)
    if architecture.query_key_norm:
        tp_dim = 0 if architecture.query_key_norm == "projection" else None
        for letter, name in (("q", "query_norm"), ("k", "key_norm")):
            rules += (Rename(f"{ours}{letter}_layernorm.weight", f"{_HF}{names[name]}.weight", tp_dim=tp_dim),)
    if architecture.attention_sinks:
        rules += (Rename(f"{ours}core_attention.softmax_offset", f"{theirs}sinks", tp_dim=0),)
    return rules


def _delta_net(architecture: Architecture, names: dict[str, str]) -> tuple[Rule, ...]:
    """A layer's gated delta net with its norm. Its rows are grouped by key head: query, key, values, gates, step sizes."""
    sizes = architecture.delta_net
    assert sizes is not None
    ours, theirs, heads = f"{_MEGATRON}self_attention.", f"{_HF}linear_attn.", sizes.num_key_heads
    key, values, steps = sizes.key_dim, sizes.values_per_key * sizes.value_dim, sizes.values_per_key
    inputs = tuple(f"{theirs}{name}.weight" for name in names["delta_input"].split())
    # Four tensors of one kind each but for the first, or two that are grouped by key head already.
    apart = ((key, key, values), (values,), (steps,), (steps,))
    blocks = apart if len(inputs) == 4 else ((2 * key + 2 * values,), (2 * steps,))
    return (
        *_norm_before(architecture, "self_attention.in_proj.layer_norm_weight", names["input_norm"]),
        GroupedRows(f"{ours}in_proj.weight", inputs, blocks, heads),
        GroupedRows(f"{ours}conv1d.weight", (f"{theirs}conv1d.weight",), ((key, key, values),), heads),
        Rename(f"{ours}A_log", f"{theirs}A_log", tp_dim=0),
        Rename(f"{ours}dt_bias", f"{theirs}dt_bias", tp_dim=0),
        Rename(f"{ours}out_norm.weight", f"{theirs}norm.weight"),
        Rename(f"{ours}out_proj.weight", f"{theirs}out_proj.weight", tp_dim=1),
    )


def _latent_attention(architecture: Architecture, names: dict[str, str]) -> tuple[Rule, ...]:
    """A layer's multi-head latent attention with its norm. What is projected down lies in one parameter: queries first."""
    sizes = architecture.latent
    assert sizes is not None
    ours, theirs, heads = f"{_MEGATRON}self_attention.", f"{_HF}self_attn.", architecture.num_heads
    down: tuple[str, ...] = (f"{theirs}kv_a_proj_with_mqa",)
    query = f"{theirs}q_proj.weight"
    norms: tuple[Rule, ...] = (Rename(f"{ours}kv_layernorm.weight", f"{theirs}kv_a_layernorm.weight"),)
    if sizes.query_rank:
        down, query = (f"{theirs}q_a_proj", *down), f"{theirs}q_b_proj.weight"
        norms += (Rename(f"{ours}q_layernorm.weight", f"{theirs}q_a_layernorm.weight"),)
    rules: tuple[Rule, ...] = (
        *_norm_before(architecture, "input_layernorm.weight", names["input_norm"]),
        RotatedRows(f"{ours}linear_down.weight", tuple(f"{name}.weight" for name in down), 1, tp_dim=None),
        *norms,
        RotatedRows(f"{ours}linear_q_up.weight", (query,), heads),
        Rename(f"{ours}linear_kv_up.weight", f"{theirs}kv_b_proj.weight", tp_dim=0),
        Rename(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", tp_dim=1),
    )
    if architecture.qkv_bias:
        rules += (RotatedRows(f"{ours}linear_down.bias", tuple(f"{name}.bias" for name in down), 1, tp_dim=None),)
    if architecture.output_bias:
        rules += (Rename(f"{ours}linear_proj.bias", f"{theirs}o_proj.bias"),)
    return rules


_MIXERS = {ATTENTION: _attention, GATED_DELTA_NET: _delta_net, LATENT_ATTENTION: _latent_attention}


def _mlp(architecture: Architecture, names: dict[str, str]) -> tuple[Rule, ...]:
    """A layer's MLP with its norm, under megatron-core's name for a norm that is fused with linear_fc1."""
    ours, theirs = f"{_MEGATRON}mlp.", f"{_HF}mlp."

    def gate_up(kind: str) -> Rule:
        if names["gate_up"]:
            return Rename(f"{ours}linear_fc1.{kind}", f"{theirs}{names['gate_up']}.{kind}", tp_dim=0, num_fused=2)
        return GateUp(f"{ours}linear_fc1.{kind}", f"{theirs}gate_proj.{kind}", f"{theirs}up_proj.{kind}")

    rules: tuple[Rule, ...] = (
        *_norm_before(architecture, "mlp.linear_fc1.layer_norm_weight", names["mlp_norm"]),
        gate_up("weight"),
        Rename(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", tp_dim=1),
    )
    if architecture.mlp_bias:
        rules += (gate_up("bias"), Rename(f"{ours}linear_fc2.bias", f"{theirs}down_proj.bias"))
    return rules


def _experts(architecture: Architecture, names: dict[str, str]) -> tuple[Rule, ...]:
    """A layer's mixture of experts with its norm. megatron-core calls the correction bias `expert_bias`."""
    moe = architecture.moe
    assert moe is not None
    ours, theirs = f"{_MEGATRON}mlp.", f"{_HF}{names['block']}."
    expert, hf_expert = f"{ours}experts.experts.{{expert}}.", f"{theirs}experts.{{expert}}."
    gate, up, down = (f"{hf_expert}{names[name]}.weight" for name in ("expert_gate", "expert_up", "expert_down"))
    matrices: tuple[Rule, ...] = (
        GateUp(f"{expert}linear_fc1.weight", gate, up), Rename(f"{expert}linear_fc2.weight", down, tp_dim=1)
    )  # fmt: skip
    if names["expert_fused"]:
        both, down = (f"{hf_expert}{name}" for name in names["expert_fused"].split())
        matrices = (
            InterleavedGateUp(f"{expert}linear_fc1.weight", both),
            Transposed(f"{expert}linear_fc2.weight", down, tp_dim=1),
        )
        if moe.expert_bias:
            matrices += (
                InterleavedGateUp(f"{expert}linear_fc1.bias", f"{both}_bias"),
                Rename(f"{expert}linear_fc2.bias", f"{down}_bias"),
            )
    rules: tuple[Rule, ...] = (
        *_norm_before(architecture, "pre_mlp_layernorm.weight", names["mlp_norm"]),
        Rename(f"{ours}router.weight", f"{theirs}{names['router']}.weight"),
        *matrices,
    )
    if moe.router_bias:
        rules += (Rename(f"{ours}router.bias", f"{theirs}{names['router']}.bias"),)
    if moe.correction_bias:
        name = names["correction_bias"]
        rules += (Buffer(f"{ours}router.expert_bias", f"{theirs}{name.removesuffix('[1]')}", lead=name.endswith("[1]")),)
    if moe.shared_width:
        shared, hf_shared = f"{ours}shared_experts.", f"{theirs}{names['shared']}."
        rules += (
            GateUp(f"{shared}linear_fc1.weight", f"{hf_shared}gate_proj.weight", f"{hf_shared}up_proj.weight"),
            Rename(f"{shared}linear_fc2.weight", f"{hf_shared}down_proj.weight", tp_dim=1),
        )
    if moe.shared_gate:
        rules += (Rename(f"{shared}gate_weight", f"{theirs}{names['shared_gate']}.weight"),)
    return rules
