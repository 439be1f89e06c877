"""Pickles of unknown origin, read without importing, calling or changing anything that they name.

A pickle is a small program: it names functions and calls them. Here every name becomes a new, empty class of its own that
remembers what it was given, and the caller makes of these records what it expects to find.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

# Types of C that cannot be changed from a pickle, and whose making does nothing.
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, dict, list, tuple)},
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
}
# They look for objects and numbers outside the pickle's own text.
_REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


class Record:
    """Stands for an object of the class `name`, which is not loaded: `arguments` it was made with, and its `state`."""

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
        """What a list, a set and a dictionary are filled with: kept, so that nothing is lost in silence."""
        self.items.append(value)

    add = append

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        known: Callable[[str, str], Any],
        stored: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._known, self._stored = known, stored
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        asked = (module, name)
        if asked in _PLAIN:
            return _PLAIN[asked]
        if asked not in self._classes:
            # Of this one reading only: a pickle can also set attributes of the classes that it names.
            found = self._known(module, name)
            self._classes[asked] = type("Record", (Record,), {"name": f"{module}.{name}"}) if found is None else found
        return self._classes[asked]

    def persistent_load(self, pid: Any) -> Any:
        if self._stored is None:
            raise pickle.UnpicklingError("it refers to something outside itself")
        return self._stored(pid)


def read_records(
    data: bytes,
    known: Callable[[str, str], Any] = lambda module, name: None,
    stored: Callable[[Any], Any] | None = None,
) -> Any:
    """The content of a pickle, of plain values and `Record`s.

    `known` may give something harmless of its own for a module and a name, or refuse them; `stored` resolves what the
    pickle refers to outside itself. Whatever is wrong with the pickle is an exception of some kind.
    """
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in _REFUSED:
            raise pickle.UnpicklingError(f"it uses {operation.name}")
        # The reader makes room for as many remembered objects as the largest number says.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it numbers {argument} objects in {len(data)} bytes")
    return _Unpickler(data, known, stored).load()
