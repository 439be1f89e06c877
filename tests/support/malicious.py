"""Pickles that run a command when they are loaded in the usual way, and other files that are made to do harm.

Each command creates the file `mark`; a reader that executes nothing leaves no trace of it.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.sft.runtime.manifest import sealed


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"  # STACK_GLOBAL


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def program(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


class _Reduced:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


# ruff: noqa: E501


def pickles(mark: Path) -> dict[str, bytes]:
    """By name: pickles each of which creates `mark` when Python's own loader reads it."""
    shell, python = f"touch '{mark}'", f"open({str(mark)!r}, 'w').close()"
    system = named("os", "system")
    run_it = call(named("builtins", "exec"), text(python))
    key = pickle.dumps({_Reduced(os.system, shell): 1})
    return {
        "os.system": program(call(system, text(shell))),
        "posix.system": program(call(named("posix", "system"), text(shell))),
        "eval": program(call(named("builtins", "eval"), text(python))),
        "exec": program(run_it),
        "Path.touch": program(call(named("pathlib", "Path.touch"), call(named("pathlib", "Path"), text(str(mark))))),
        "subprocess": program(call(named("subprocess", "getoutput"), text(shell))),
        "runpy": program(call(named("runpy", "_run_code"), call(named("builtins", "compile"), text(python), text("x"), text("exec")), b"}")),
        "timeit": program(call(named("timeit", "timeit"), text(python), text("pass"), call(named("time", "perf_counter")) + b"0" + named("time", "perf_counter"), b"K\x01")),
        "a name behind a name": program(call(named("torch.serialization", "os.system"), text(shell))),
        "a name behind an allowed module": program(call(named("torch.distributed.checkpoint.metadata", "os.system"), text(shell))),
        "getattr": program(call(call(named("builtins", "getattr"), named("os", "path") + b"0" + call(named("importlib", "import_module"), text("os")), text("system")), text(shell))),
        "attrgetter": program(call(call(call(named("operator", "attrgetter"), text("system")), call(named("importlib", "import_module"), text("os"))), text(shell))),
        "partial": program(call(call(named("functools", "partial"), system, text(shell)))),
        "map and list": program(call(named("builtins", "list"), call(named("builtins", "map"), system, b"]" + text(shell) + b"a"))),
        "a call within a dictionary": program(b"}" + text("a") + b"]" + call(system, text(shell)) + b"as"),
        "a call as a key": key,
        "a call that is forgotten": program(call(system, text(shell)) + b"0}"),
        "a call from the memo": program(system + b"q\x000" + call(b"h\x00", text(shell))),
        "INST": b"(S" + repr(shell).encode() + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS" + repr(shell).encode() + b"\no.",
        "GLOBAL": b"cos\nsystem\n(S" + repr(shell).encode() + b"\ntR.",
        "NEWOBJ after BUILD": program(
            named("argparse", "Namespace") + b"(N}" + text("__new__") + named("builtins", "exec") + b"st" + b"b0"
            + call(named("builtins", "exec"), text(python))
        ),
        "BUILD with a state that is called": program(
            named("types", "SimpleNamespace") + b")\x81}" + text("__setstate__") + system + b"sb" + text(shell) + b"b"
        ),
        "an extension": program(
            call(named("copyreg", "add_extension"), text("os"), text("system"), b"K\xf0") + b"0" + b"\x82\xf0" + b"(" + text(shell) + b"tR"
            + call(named("copyreg", "remove_extension"), text("os"), text("system"), b"K\xf0")
        ),
        "import": program(call(call(named("builtins", "getattr"), call(named("builtins", "__import__"), text("os")), text("system")), text(shell))),
    }  # fmt: skip


def bombs() -> dict[str, bytes]:
    """By name: small pickles that ask for very much memory, or never end."""
    return {
        "bytearray": program(call(named("builtins", "bytearray"), b"\x8a\x06" + (1 << 40).to_bytes(6, "little"))),
        "a memo of 2 thousand million": b"\x80\x02}r" + struct.pack("<I", (1 << 31) - 2) + b".",
        "a memo in digits": b"}p99999999999\n.",
        "bytes of an exabyte": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
        "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "tuples within tuples": program(b")" + b"\x85" * 200_000),
    }


def archive(data: bytes, storage: bytes = b"", deflated: bool = False, names: tuple[str, ...] = ()) -> bytes:
    """A file as torch.save makes it with `data` as its pickle; `names` are more entries."""
    result = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(result, "w", kind) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", storage)
        file.writestr("archive/version", "3\n")
        for name in names:
            file.writestr(name, "out")
    return result.getvalue()


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], storage: bytes = b"") -> bytes:
    """The pickle of a float tensor of one storage; `storage` replaces the reference to it."""
    parts = text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04"
    reference = storage or b"(" + parts + b"tQ"  # BINPERSID
    sizes = pickle.dumps(size, protocol=2)[2:-1]
    strides = pickle.dumps(stride, protocol=2)[2:-1]
    return (
        b"\x80\x04"
        + call(named("torch._utils", "_rebuild_tensor_v2"), reference, b"K\x00", sizes, strides, b"\x89", b"N")
        + b"."
    )


def templates(mark: Path) -> dict[str, str]:
    """Chat templates that reach for Python, or for all of the memory or time."""
    shell = f"touch '{mark}'"
    message = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return {
        "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + message,
        "globals": "{{ cycler.__init__.__globals__.os.system(" + repr(shell) + ") }}" + message,
        "lipsum": "{{ lipsum.__globals__['os'].system(" + repr(shell) + ") }}" + message,
        "raise_exception": "{{ raise_exception.__globals__['__builtins__']['eval']('1') }}" + message,
        "attr filter": "{{ (messages|attr('__class__'))|attr('__base__')|attr('__subclasses__')() }}" + message,
        "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}" + message,
        "include": "{% include '/etc/passwd' %}" + message,
        "a list changed": "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}" + message,
    }


def template_bombs() -> dict[str, str]:
    return {
        "range": "{% for i in range(10**12) %}x{% endfor %}",
        "text": "{{ 'x' * 10**11 }}",
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
        "doubled": "{% set n = namespace(t='xxxxxxxx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "a power": "{{ 9 ** 9 ** 9 }}",
        "recursion": "{% macro again(x) %}{{ again(x ~ x) }}{% endmacro %}{{ again('xxxxxxxx') }}",
    }


def write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def save_reduced(path: Path, mark: Path) -> None:
    """What torch.save writes of an object that runs a command when it is loaded without care."""
    torch.save({"model": _Reduced(os.system, f"touch '{mark}'")}, path)


def forge_manifest(checkpoint: Path, files: dict[str, Any]) -> None:
    """A checkpoint's manifest that names these files, with a seal that holds: what a careful attacker would write."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(sealed({**content, "files": files})))


def call_main(monkeypatch: pytest.MonkeyPatch, entry: Callable[[list[str]], int], *arguments: object) -> None:
    entry([*map(str, arguments)])
