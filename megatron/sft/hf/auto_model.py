"""Which of transformers' classes loads a model's folder: some text models stand in a folder with a vision tower."""

from pathlib import Path
from typing import Any

from megatron.sft.families.registry import WRAPPERS

# A model_type that transformers does not know -> its name there.
_KNOWN_AS = {"kimi_k2": "deepseek_v3"}


def auto_class(config: dict[str, Any]) -> Any:
    """AutoModelForCausalLM, or the class for images and text where the text model is one part of several."""
    import transformers

    has_other_parts = config.get("model_type") in WRAPPERS
    return transformers.AutoModelForImageTextToText if has_other_parts else transformers.AutoModelForCausalLM


def loaded(config: dict[str, Any], folder: Path, stated: bool = False, **options: Any) -> Any:
    """transformers' model of a folder with this config.json; no code of the folder is run.

    stated: with `config` itself, which is not what the folder says.
    """
    import transformers

    model_type = str(config.get("model_type"))
    if stated or model_type in _KNOWN_AS:
        fields = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
        options["config"] = transformers.CONFIG_MAPPING[_KNOWN_AS.get(model_type, model_type)].from_dict(fields)
    return auto_class(config).from_pretrained(folder, trust_remote_code=False, **options)


def text_prefix(config: dict[str, Any]) -> str:
    """What the modules of the text model's body begin with in that class; `model.` in a family's table."""
    return "model.language_model." if config.get("model_type") in WRAPPERS else "model."
