"""Where models and data are kept, names of folders made from hub ids, and paths as messages show them."""

import difflib
import os
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[3] / "assets"

# The files of an adapter as PEFT writes it.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def model_folder_name(source: str) -> str:
    """`deepseek-ai/DeepSeek-R1` becomes `deepseek_ai_DeepSeek_R1`."""
    return source.replace("/", "_").replace("-", "_")


def data_folder_name(source: str) -> str:
    """`Vinnnf/Hybrid-OpenThoughts2-1M-1.5B` becomes `Vinnnf-Hybrid-OpenThoughts2-1M-1.5B`."""
    return source.replace("/", "-")


def similar_folder(path: Path) -> str:
    """` (did you mean …?)` for a folder whose name differs in case, -, _ or . only, or by two letters; else nothing."""
    if not path.parent.is_dir():
        return ""
    names = [each.name for each in path.parent.iterdir() if each.is_dir()]
    plain = {model_folder_name(name).replace(".", "_").lower(): name for name in names}
    near = difflib.get_close_matches(model_folder_name(path.name).replace(".", "_").lower(), plain, n=1, cutoff=0.9)
    return f" (did you mean {path.with_name(plain[near[0]])}?)" if near else ""


def shown(path: Path) -> str:
    """A path as a user would type it: relative if it is below the current folder."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
