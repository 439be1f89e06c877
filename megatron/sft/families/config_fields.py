"""Which fields of config.json are known: used, supported at one value only, or without effect on what the model computes.

Any other field is refused by name, unless its value is empty.
"""

from collections.abc import Collection
from typing import Any

from megatron.sft.runtime.errors import UserError

# Read by `read_architecture`.
USED = {
    "model_type", "num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "dtype", "torch_dtype", "layer_types",
}  # fmt: skip
# Field -> the only value that is supported, in every family.
FIXED = {"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0}
# The file's origin, how to generate, how training started: nothing that a forward pass depends on.
IMMATERIAL = {
    "architectures", "transformers_version", "_name_or_path", "name_or_path", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "use_cache", "initializer_range", "return_dict", "output_attentions",
    "output_hidden_states", "_attn_implementation", "_attn_implementation_autoset", "transformers.js_config",
    "torchscript", "use_bfloat16", "id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task",
    "prefix", "tokenizer_class", "model_max_length", "chunk_size_feed_forward", "num_beams", "max_length", "do_sample",
    "temperature", "top_p", "top_k", "repetition_penalty", "length_penalty", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# Fields of a model with other parts that its text model has too.
SHARED = ("tie_word_embeddings", "dtype", "torch_dtype")
# Fields of such a model next to text_config that say nothing of its text model: other parts, and ids of their tokens.
_WRAPPER = {
    "model_type", "text_config", "vision_config", *SHARED, "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "image_token_index", "boi_token_index", "eoi_token_index", "mm_tokens_per_image",
    "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer",
    "language_model_only", "attn_implementation",
}  # fmt: skip
# Refused with another reason than that they are unknown.
_REASONS = {
    "quantization_config": "the weights are quantised: take the model in its original precision",
    "auto_map": "the folder contains Python code, which is not run",
}


def check_fields(
    config: dict[str, Any], where: str, used: Collection[str], fixed: dict[str, Any], immaterial: Collection[str]
) -> None:
    """A `UserError` for a field with an unsupported value, and for an unknown field.

    `used`, `fixed`, `immaterial`: the family's, in addition to those above. An unknown field that is null, false or empty is
    ignored. `where` names the file in messages.
    """
    model_type = config.get("model_type")
    own = {*used, *immaterial}
    for field, wanted in {**{name: value for name, value in FIXED.items() if name not in own}, **fixed}.items():
        value = config.get(field)
        if value is not None and value != wanted:
            raise UserError(f"{where}: {field}={value!r} is not supported for {model_type} (only {wanted!r})")
    known = USED | IMMATERIAL | FIXED.keys() | fixed.keys() | set(used) | set(immaterial)
    for field in sorted(config.keys() - known):
        value = config[field]
        if value is None or value is False or value in ([], {}, ""):
            continue
        reason = _REASONS.get(field)
        if reason is None:
            reason = f"it is not known for {model_type} and could change what the model computes; delete it if it does not"
        raise UserError(f"{where}: {field}={_short(value)} is not supported: {reason}")


def text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that has the text model's sizes: text_config, or all of it."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def flat_config(config: dict[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """The text model's config.json out of that of a model with other parts; what they share at the top counts most.

    model_type: of the text model, unless its own says another.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{where}: {config.get('model_type')} without a text_config: is it the model's own config.json?")
    for field in sorted(config.keys() - _WRAPPER - IMMATERIAL):
        if config[field] not in (None, False, [], {}, ""):
            reason = _REASONS.get(field, "it is not known next to text_config; delete it if it changes nothing for text")
            raise UserError(f"{where}: {field}={_short(config[field])} is not supported: {reason}")
    shared = {name: config[name] for name in SHARED if config.get(name) is not None}
    return {"model_type": model_type, **text, **shared}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
