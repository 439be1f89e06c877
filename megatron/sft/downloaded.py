"""What a download leaves beside a model's files: where they are from, and the checksums that the hub has of the large ones."""

from collections.abc import Mapping
from pathlib import Path

from megatron.sft.checked_once import check_once
from megatron.sft.manifest import check_sizes, files_of, read_json

RECORD = ".download.json"
_ADVICE = "download the model again; if you changed it on purpose, remove " + RECORD


def facts_of(sizes: Mapping[str, int], checksums: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Size and checksum of the files that the hub has a checksum of."""
    return {name: {"bytes": sizes[name], "sha256": checksum} for name, checksum in checksums.items() if name in sizes}


def check_weights(folder: Path) -> None:
    """Compare a downloaded model's files with the hub's checksums. A folder that was made by hand has none to compare."""
    record = folder / RECORD
    if not record.is_file():
        return
    content = read_json(record, "download record", _ADVICE)
    if not isinstance(content, dict) or not content.get("checksums"):
        return
    files = files_of(folder, record, content["checksums"])
    # A tokenizer is often edited.
    weights = {path: facts for path, facts in files.items() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")}
    check_sizes(weights, _ADVICE)
    check_once(weights, _ADVICE, (folder / ".download.checked.json",))
