"""What a folder to be asked holds: a whole model, or a PEFT adapter of one that lies elsewhere."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.sft.hf.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megatron.sft.runtime.errors import UserError, first_line
from megatron.sft.runtime.manifest import read_json


@dataclass(frozen=True)
class ModelFolder:
    """model: config.json and weights. adapter: PEFT's folder, None without. tokenizer: the folder with the tokenizer to use."""

    model: Path
    adapter: Path | None
    tokenizer: Path

    @property
    def paths(self) -> list[Path]:
        """The folders whose files decide the answers."""
        return list(dict.fromkeys([self.model, self.tokenizer, *([self.adapter] if self.adapter else [])]))


def open_model_folder(folder: Path) -> ModelFolder:
    """A folder as a user gives it. One without a model, and an adapter whose model is not there, are a `UserError`."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: run scripts/5_export.sh, or correct the path")
    if not (folder / ADAPTER_CONFIG).is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: give a model folder, such as scripts/5_export.sh writes")
        if (folder / "generation_config.json").exists():  # transformers passes over a damaged one
            read_json(folder / "generation_config.json", "generation configuration", "take the model's own file")
        return ModelFolder(folder, None, folder)
    config: Any = read_json(folder / ADAPTER_CONFIG, "adapter configuration", "take another copy of the adapter")
    named = os.environ.get("BASE") or (config.get("base_model_name_or_path") if isinstance(config, dict) else None)
    if not named or not (Path(named) / "config.json").is_file():
        raise UserError(
            f"{folder} is an adapter of {named}, which is not a model folder here: set BASE to the folder of its base model"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}: export it again, or take a whole copy")
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return ModelFolder(Path(named), folder, folder if has_tokenizer else Path(named))


def with_adapter(model: Any, adapter: Path) -> Any:
    """The transformers model with PEFT's adapter in its layers. `UserError` if PEFT cannot load it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(
            f"an adapter needs the package peft ({first_line(error)}): pip install peft, or export with MERGE=1"
        ) from None
    try:
        return PeftModel.from_pretrained(model, str(adapter)).get_base_model()
    except Exception as error:  # PEFT raises errors of any type for a folder that does not fit
        raise UserError(f"adapter {adapter} cannot be loaded ({first_line(error)}): is BASE its model?") from None


def adapter_rank(adapter: Path) -> int:
    """The rank that adapter_config.json names."""
    return int(read_json(adapter / ADAPTER_CONFIG, "adapter configuration", "take another copy of the adapter")["r"])
