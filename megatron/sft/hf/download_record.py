"""The record that a download adds to a model's files: their origin, and the hub's checksums of the large ones."""

from collections.abc import Mapping
from pathlib import Path

from megatron.sft.runtime.checksum_cache import check_once
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import Files, check_sizes, check_sums, listed_files, read_json

RECORD = ".download.json"
_ADVICE = "download the model again; if you changed it on purpose, remove " + RECORD


def download_facts(sizes: Mapping[str, int], checksums: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Size in bytes and SHA-256 of the files whose checksum the hub has, by name."""
    return {name: {"bytes": sizes[name], "sha256": checksum} for name, checksum in checksums.items() if name in sizes}


def _recorded(folder: Path) -> Files:
    """The files whose checksum is in the record; none for a folder that was made by hand."""
    record = folder / RECORD
    if not record.is_file():
        return {}
    content = read_json(record, "download record", _ADVICE)
    if not isinstance(content, dict) or not content.get("checksums"):
        return {}
    return listed_files(folder, record, content["checksums"])


def check_arrived(folder: Path) -> None:
    """Compare what has just been fetched with the hub's checksums. A file that differs is removed, so that it is fetched again,
    and is a `UserError`."""
    for path, facts in _recorded(folder).items():
        try:
            check_sums({path: facts}, "run the same command again to fetch this file again")
        except UserError:
            path.unlink(missing_ok=True)
            raise


def check_weights(folder: Path) -> None:
    """Compare a downloaded model's weights with the hub's checksums; a difference is a `UserError`. A folder that was made by
    hand has no checksums."""
    # Not the other large files: a tokenizer, for example, is often edited.
    endings = (".safetensors", ".bin", ".pt", ".pth")
    weights = {path: facts for path, facts in _recorded(folder).items() if path.suffix in endings}
    if not weights:
        return
    check_sizes(weights, _ADVICE)
    check_once(weights, _ADVICE, (folder / ".download.checked.json",))
