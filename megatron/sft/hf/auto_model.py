"""Which of transformers' classes loads a model's folder: some text models stand in a folder with a vision tower."""

from typing import Any


def auto_class(config: dict[str, Any]) -> Any:
    """AutoModelForCausalLM, or the class for images and text where transformers has no class for the text alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    known = {cls.model_type for cls in MODEL_FOR_CAUSAL_LM_MAPPING}
    if "text_config" in config and config.get("model_type") not in known:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText
    return AutoModelForCausalLM
