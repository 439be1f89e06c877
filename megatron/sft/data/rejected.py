"""Keeps the rows that could not be used, with the reasons, beside the data: for a look at them, and to mend them."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from megatron.sft.data.sources import SourceRecord


class RejectedRows:
    """Writes <data>.rejected.jsonl under a temporary name, put in place by `keep` only; an old one is removed then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> "RejectedRows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._temporary.unlink(missing_ok=True)

    def add(self, row: SourceRecord, reason: str) -> None:
        content: Any = row.content
        if isinstance(content, bytes):
            content = content.decode("utf-8", errors="backslashreplace")
        elif not isinstance(content, dict):
            content = None
        line = {"file": str(row.path), row.unit: row.line, "reason": reason, "row": content}
        mode = "ab" if self.num_rows else "wb"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._temporary, mode) as file:
            file.write(orjson.dumps(line, default=repr, option=orjson.OPT_APPEND_NEWLINE))
        self.num_rows += 1

    def keep(self) -> None:
        if self.num_rows:
            os.replace(self._temporary, self.path)
        else:
            self.path.unlink(missing_ok=True)
