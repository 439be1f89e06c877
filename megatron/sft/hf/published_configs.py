"""A model's architecture before it is downloaded or converted: from config.json, or as published in assets/models.json."""

import difflib
import re
from pathlib import Path
from typing import Any

from megatron.sft.families.architecture import Architecture
from megatron.sft.hf.names import ASSETS, model_folder_name, shown
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import read_json

# Hub id -> the fields of config.json that give the model's size, as its authors published them.
PUBLISHED = ASSETS / "models.json"


def published_configs() -> dict[str, dict[str, Any]]:
    """Hub id -> config.json of the models that the recipes name."""
    configs: dict[str, dict[str, Any]] = read_json(PUBLISHED, "table of models", "take it from the repository")
    return configs


def find_architecture(name: str) -> tuple[Architecture, str]:
    """The architecture of a model given by its folder, config.json or hub id, and where it was read; else a `UserError`."""
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    configs = {} if path.is_file() else published_configs()
    if not path.is_file() and name not in configs:
        near = difflib.get_close_matches(name, configs, n=1)
        raise UserError(
            f"{name} is neither a folder with a config.json nor one of the {len(configs)} in {shown(PUBLISHED)}"
            f"{f' (did you mean {near[0]}?)' if near else ''}: download it with scripts/1_download.sh model {name}"
        )
    from megatron.sft.families.registry import read_architecture  # with torch, which takes seconds

    if path.is_file():
        config = read_json(path, "model configuration", "take the model's own file")
        return read_architecture(config, str(path)), str(path)
    return read_architecture(configs[name], name), f"{name}'s published config.json"


def unconverted(checkpoint: Path) -> tuple[Architecture | None, str, str]:
    """For a converted model that does not exist: its architecture if known, where that is from, and the command that makes it.

    The names are those that scripts/1_download.sh and 2_convert.sh give: <folder of the hub id>_Megatron_TP<n>PP<n>.
    """
    named = re.fullmatch(r"(.+)_[Mm]egatron_TP(\d+)PP(\d+)", checkpoint.name)
    if named is None:
        return None, "", f"bash scripts/2_convert.sh MODEL TP PP {checkpoint}"
    source = checkpoint.with_name(named[1])
    convert = f"bash scripts/2_convert.sh {source} {named[2]} {named[3]}"
    others = sorted(path for path in checkpoint.parent.glob(f"{named[1]}_[Mm]egatron_TP*PP*") if path.is_dir())
    if others:
        convert += f" (or PRETRAIN_CHECKPOINT_PATH={others[0]}, which is there)"
    if (source / "config.json").is_file():
        return *find_architecture(str(source)), convert
    for id in published_configs():
        if model_folder_name(id) == named[1]:
            return *find_architecture(id), f"bash scripts/1_download.sh model {id}; {convert}"
    return None, "", f"bash scripts/1_download.sh model ID, which makes {source}; {convert}"
