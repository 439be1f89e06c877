"""Copies of tokenised data, to damage."""

import shutil
from pathlib import Path

from megatron.sft.data.tokenized import data_file


def copy_of_data(prefix: Path, folder: Path) -> Path:
    folder.mkdir()
    for ending in ("bin", "idx", "json"):
        shutil.copy(data_file(prefix, ending), folder)
    return folder / prefix.name
