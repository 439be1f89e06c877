"""Short names of the inputs of tokenised data, by which a run's losses are told apart."""

from collections import Counter
from pathlib import Path
from typing import Any

from megatron.sft.data.sources import DATA_ENDINGS


def source_names(manifest: dict[str, Any]) -> list[str]:
    """The name of each input in the manifest's order: of its file or folder, numbered where several have the same."""
    names = [_short(Path(source["path"])) for source in manifest.get("sources", [])]
    counts, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return result


def _short(path: Path) -> str:
    name = path.name
    while name.endswith((*DATA_ENDINGS, ".gz", ".zst")) and Path(name).stem:
        name = Path(name).stem
    return name
