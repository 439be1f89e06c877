"""Writing a folder that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.output_lock import held


@contextmanager
def whole_folder(output: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder next to `output` that is renamed to it at the end, and removed if anything goes wrong.

    An `output` that exists and is not an empty folder is a `UserError`, or is replaced by the new folder with `replace`.
    """
    if not replace and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty: give another output folder, or move it away")
    output.parent.mkdir(parents=True, exist_ok=True)
    with held(output):
        yield from _staged(output)


def _staged(output: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    replaced = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        if output.exists():
            output.rename(replaced)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
