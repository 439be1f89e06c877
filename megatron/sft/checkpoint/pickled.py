"""Pickles of unknown origin, read without importing, calling or changing anything that they name.

A pickle is a small program: it names functions and calls them. Here every name becomes a new, empty class that remembers its
arguments, and the caller turns these records into what it expects to find.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.sft.runtime.errors import UserError, first_line

# Types that a pickle cannot change, and whose construction has no effect.
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, dict, list, tuple)},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}
# Opcodes that refer to objects outside the pickle's bytes.
_REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


class Record:
    """Stands for an object of the class `name`, which is not loaded: its constructor's `arguments`, `state` and `items`."""

    name = ""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Record":
        record = super().__new__(cls)
        record.arguments, record.state, record.items = arguments, None, []
        return record

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any
        self.items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *arguments: Any, **keywords: Any) -> "Record":
        return self

    def append(self, value: Any) -> None:
        """How a list is filled, as `add` a set and `__setitem__` a dictionary; kept, so that nothing is lost."""
        self.items.append(value)

    add = append

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: Callable[[str, str], Any], stored: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._known, self._stored = known, stored
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        asked = (module, name)
        if asked in _PLAIN:
            return _PLAIN[asked]
        if asked not in self._classes:
            # A new class for each reading: a pickle can also set attributes of the classes that it names.
            found = self._known(module, name)
            self._classes[asked] = type("Record", (Record,), {"name": f"{module}.{name}"}) if found is None else found
        return self._classes[asked]

    def persistent_load(self, pid: Any) -> Any:
        if self._stored is None:
            raise pickle.UnpicklingError("it refers to something outside itself")
        return self._stored(pid)


def read_records(
    data: bytes, known: Callable[[str, str], Any] = lambda module, name: None, stored: Callable[[Any], Any] | None = None
) -> Any:
    """The content of a pickle, of plain values and `Record`s.

    `known(module, name)` may return something harmless to use instead of a record, or raise; `stored(pid)` resolves the
    pickle's references to data outside itself. A bad pickle raises an exception of any type: read it in `refusing_damage`.
    """
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in _REFUSED:
            raise pickle.UnpicklingError(f"it uses {operation.name}")
        # The reader allocates memory for as many objects as the largest number says.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it numbers {argument} objects in {len(data)} bytes")
    return _Unpickler(data, known, stored).load()


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while the file `path` of a checkpoint is read into a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is not whole, take another one") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or not to be trusted ({first_line(error)}): take another checkpoint") from None
