"""What a download leaves beside a model's files: where they are from, and the checksums that the hub has of the large ones."""

from collections.abc import Mapping
from pathlib import Path

from megatron.sft.runtime.checksum_cache import check_once
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import Files, check_sizes, check_sums, listed_files, read_json

RECORD = ".download.json"
_ADVICE = "download the model again; if you changed it on purpose, remove " + RECORD


def download_facts(sizes: Mapping[str, int], checksums: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Size and checksum of the files that the hub has a checksum of."""
    return {name: {"bytes": sizes[name], "sha256": checksum} for name, checksum in checksums.items() if name in sizes}


def _recorded(folder: Path) -> Files:
    """The files that the record has a checksum of; none for a folder that was made by hand."""
    record = folder / RECORD
    if not record.is_file():
        return {}
    content = read_json(record, "download record", _ADVICE)
    if not isinstance(content, dict) or not content.get("checksums"):
        return {}
    return listed_files(folder, record, content["checksums"])


def check_arrived(folder: Path) -> None:
    """Compare what has just been fetched. A file that is not as the hub has it is removed, so that it is fetched again."""
    for path, facts in _recorded(folder).items():
        try:
            check_sums({path: facts}, "run the same command again, which fetches it anew")
        except UserError:
            path.unlink(missing_ok=True)
            raise


def check_weights(folder: Path) -> None:
    """Compare a downloaded model's weights with the hub's checksums. A folder that was made by hand has none to compare."""
    # Other large files, such as a tokenizer, are often edited.
    endings = (".safetensors", ".bin", ".pt", ".pth")
    weights = {path: facts for path, facts in _recorded(folder).items() if path.suffix in endings}
    if not weights:
        return
    check_sizes(weights, _ADVICE)
    check_once(weights, _ADVICE, (folder / ".download.checked.json",))
