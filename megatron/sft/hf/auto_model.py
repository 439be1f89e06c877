"""Which of transformers' classes loads a model's folder: some text models stand in a folder with a vision tower."""

from typing import Any

from megatron.sft.families.registry import WRAPPERS


def auto_class(config: dict[str, Any]) -> Any:
    """AutoModelForCausalLM, or the class for images and text where the text model is one part of several."""
    import transformers

    has_other_parts = config.get("model_type") in WRAPPERS
    return transformers.AutoModelForImageTextToText if has_other_parts else transformers.AutoModelForCausalLM


def text_prefix(config: dict[str, Any]) -> str:
    """What the modules of the text model's body begin with in that class; `model.` in a family's table."""
    return "model.language_model." if config.get("model_type") in WRAPPERS else "model."
