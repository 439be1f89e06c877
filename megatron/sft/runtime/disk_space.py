"""Whether there is room for what is about to be written."""

import shutil
from pathlib import Path

from megatron.sft.runtime.errors import UserError


def check_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """A `UserError` with both numbers if the disk of `folder` (or of the nearest parent that exists) is too small."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{what} needs {num_bytes / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free: "
            "make room there, or give an output folder on another disk"
        )
