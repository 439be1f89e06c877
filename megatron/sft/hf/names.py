"""Where models and data are kept, names of folders made from hub ids, and paths as messages show them."""

import os
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[3] / "assets"


def model_folder_name(source: str) -> str:
    """`deepseek-ai/DeepSeek-R1` becomes `deepseek_ai_DeepSeek_R1`."""
    return source.replace("/", "_").replace("-", "_")


def data_folder_name(source: str) -> str:
    """`Vinnnf/Hybrid-OpenThoughts2-1M-1.5B` becomes `Vinnnf-Hybrid-OpenThoughts2-1M-1.5B`."""
    return source.replace("/", "-")


def shown(path: Path) -> str:
    """A path as a user would type it: relative if it is below the current folder."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
