"""Damages models and checkpoints in every way of a list and converts or exports each: it must end with one clear error.

damaged_inputs.py MODEL WORK prints `refused NAME: MESSAGE` for each and `accepted NAME` for what went through.
"""

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron.sft import convert, export
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed, write_json
from tests.support import tiny

Damage = Callable[[Path], None]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Evil:
    """A pickle that runs a command when it is loaded."""

    mark = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class EvilCode(Evil):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({self.mark!r}, 'w').close()",)


class EvilPath(Evil):
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.mark),)


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def write(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def remove(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = next(folder.rglob(name))
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Edit the header of model.safetensors as JSON, its data left as they are."""

    def damage(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        fields = json.loads(content[8 : 8 + length])
        edit(fields)
        text = json.dumps(fields).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def header_length(value: int) -> Damage:
    return lambda folder: (folder / SINGLE).write_bytes(struct.pack("<Q", value) + (folder / SINGLE).read_bytes()[8:]) and None


def twice(folder: Path) -> None:
    """The first tensor's entry a second time in the header."""
    content = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + length].decode().rstrip()
    name = next(name for name in json.loads(text) if name != "__metadata__")
    text = text[:-1] + f",{json.dumps(name)}:{json.dumps(json.loads(text)[name])}}}"
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + length :])


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Edit the weights as tensors."""

    def damage(folder: Path) -> None:
        weights = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
        edit(weights)
        save_file(weights, folder / SINGLE, metadata={"format": "pt"})

    return damage


def fields(name: str, **values: object) -> Damage:
    def damage(folder: Path) -> None:
        path = next(folder.rglob(name))
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps(sealed(content) if name == "manifest.json" else content))

    return damage


def weight_map(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def evil(name: str, kind: type[Evil], beside: bool = False) -> Damage:
    """A pickle that runs code, alone or as one value among a checkpoint's."""

    def damage(folder: Path) -> None:
        path = next(folder.rglob(name))
        if name.endswith(".pt"):
            torch.save({"args": kind(), "model": kind()} if beside else kind(), path)
        else:
            path.write_bytes(pickle.dumps([kind()] if beside else kind()))

    return damage


def flip(name: str, share: float) -> Damage:
    """Change one byte, and take the checksums of files out of the manifest, so that only those of tensors are left."""

    def damage(folder: Path) -> None:
        path = next(folder.rglob(name))
        content = bytearray(path.read_bytes())
        content[int(share * len(content))] ^= 0x40
        path.write_bytes(content)

    return damage


def bad(weights: dict[str, torch.Tensor], number: int, value: float) -> None:
    weights[sorted(weights)[number]].view(-1)[-1] = value


def rename(weights: dict[str, Any], old: str, new: str) -> None:
    weights[new] = weights.pop(old)


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in entries.items() if name != "__metadata__")


_Q = "model.layers.0.self_attn.q_proj.weight"


def model_damages() -> Iterator[tuple[str, Damage]]:
    for share in (0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999):
        yield f"weights cut to {share}", cut(SINGLE, share)
    for length in (0, 1, 7, 500, 10**6, 10**9, 2**40, 2**63, 2**64 - 1):
        yield f"header of {length} bytes", header_length(length)
    edits: dict[str, Callable[[dict[str, Any]], object]] = {
        "unknown dtype": lambda h: first(h).update(dtype="F7"),
        "other dtype": lambda h: first(h).update(dtype="F64"),
        "other shape": lambda h: first(h).update(shape=[3, 5]),
        "negative shape": lambda h: first(h).update(shape=[-1, -8384]),
        "offsets beyond the file": lambda h: first(h).update(data_offsets=[10**9, 10**9 + 4]),
        "overlapping offsets": lambda h: first(h).update(data_offsets=[v + 4 for v in first(h)["data_offsets"]]),
        "no offsets": lambda h: first(h).pop("data_offsets"),
        "a list for a tensor": lambda h: h.update(x=[1]),
        "fractions for offsets": lambda h: first(h).update(data_offsets=[float(v) for v in first(h)["data_offsets"]]),
        "text for a shape": lambda h: first(h).update(shape=[str(n) for n in first(h)["shape"]]),
        "truth for a shape": lambda h: first(h).update(shape=[True, *first(h)["shape"]]),
        "a hole": lambda h: [
            e.update(data_offsets=[v + 8 for v in e["data_offsets"]]) for n, e in h.items() if n != "__metadata__"
        ],
        "text for offsets": lambda h: first(h).update(data_offsets="ab"),
        "a name less": lambda h: h.pop(_Q),
        "another name": lambda h: rename(h, _Q, "model.layers.0.q.weight"),
    }
    for name, edit in edits.items():
        yield name, header(edit)
    yield "a tensor twice", twice
    for number in (0, 1, 5, 20, 30):
        for value in (float("nan"), float("inf")):
            yield f"{value} in tensor {number}", tensors(lambda w, n=number, v=value: bad(w, n, v))  # type: ignore[misc]
    yield "a tensor missing", tensors(lambda w: w.pop(_Q))
    yield "a tensor more", tensors(lambda w: w.update(extra=torch.ones(2)))
    yield "a wider matrix", tensors(lambda w: w.update({_Q: torch.ones(64, 65)}))
    yield "a matrix of other rows", tensors(lambda w: w.update({_Q: torch.ones(96, 64)}))
    yield "whole numbers", tensors(lambda w: w.update({_Q: torch.ones(64, 64, dtype=torch.int8)}))
    yield "no config", remove("config.json")
    for number, text in enumerate(("", "{", "[]", "3", '{"model_type": "qwen2"}', "\udcff".encode("utf-8", "surrogateescape"))):
        yield f"config {number}", write("config.json", text)
    for name, value in {
        "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 95, "num_key_value_heads": 3, "vocab_size": 130,
        "num_attention_heads": "many", "rms_norm_eps": None, "model_type": "gpt2", "logit_scale": 2.0, "head_dim": 7,
    }.items():  # fmt: skip
        yield f"{name} {value}", fields("config.json", **{name: value})
    yield "no weights", remove(SINGLE)


def sharded_damages() -> Iterator[tuple[str, Damage]]:
    for number in (1, 2, 3):
        yield f"shard {number} missing", remove(f"model-0000{number}-of-*")
        yield f"shard {number} cut", cut(f"model-0000{number}-of-*", 0.8)
    for place in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "", "nothing.safetensors"):
        yield f"index to {place!r}", weight_map(lambda m, p=place: m.update({_Q: p}))  # type: ignore[misc]
    yield "index to the wrong shard", weight_map(lambda m: m.update({_Q: sorted(set(m.values()))[-1]}))
    yield "index to a number", weight_map(lambda m: m.update({_Q: 3}))
    yield "index without a tensor", weight_map(lambda m: m.pop(_Q))
    for text in ("", "[]", "{}", '{"weight_map": []}'):
        yield f"index {text!r}", write(INDEX, text)


def checkpoint_damages(data: str) -> Iterator[tuple[str, Damage]]:
    """`data`: a file that holds weights."""
    for text in ("abc", "7", "-1", "", "1.5", "\x00\xff"):
        yield f"tracker {text!r}", write("latest_checkpointed_iteration.txt", text)
    yield "no tracker", remove("latest_checkpointed_iteration.txt")
    for share in (0, 0.3, 0.95):
        yield f"data cut to {share}", cut(data, share)
    for share in (0.2, 0.45, 0.6, 0.75):
        yield f"a bit flipped at {share}", flip(data, share)
    yield "data missing", remove(data)
    yield "manifest not JSON", cut("manifest.json", 0.5)
    yield "manifest names another file", fields("manifest.json", files={"../../x": {"bytes": 1, "sha256": "0"}})
    yield "manifest of another model", fields("manifest.json", source={"config": {"model_type": "gpt2"}})


def torch_dist_damages() -> Iterator[tuple[str, Damage]]:
    yield from checkpoint_damages("__0_0.distcp")
    for share in (0.1, 0.6, 0.98):
        yield f"metadata cut to {share}", cut(".metadata", share)
    for kind in (Evil, EvilCode, EvilPath):
        yield f"metadata {kind.__name__}", evil(".metadata", kind)
        yield f"metadata with {kind.__name__}", evil(".metadata", kind, beside=True)
        yield f"data {kind.__name__}", evil("__0_0.distcp", kind)


def torch_damages() -> Iterator[tuple[str, Damage]]:
    yield from checkpoint_damages("model_optim_rng.pt")
    yield "a rank missing", remove("mp_rank_01_001")
    for kind in (Evil, EvilCode, EvilPath):
        yield f"weights {kind.__name__}", evil("model_optim_rng.pt", kind)
        yield f"weights with {kind.__name__}", evil("model_optim_rng.pt", kind, beside=True)


def main() -> None:
    model, work = Path(sys.argv[1]), Path(sys.argv[2])
    Evil.mark = str(work / "EXECUTED")
    sharded = work / "sharded"
    shutil.copytree(model, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="200KB")
    for form, sizes in (("torch_dist", ()), ("torch", ("2", "2"))):
        names = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size")
        more = [part for pair in zip(names, sizes, strict=False) for part in pair]
        call(convert.main, "--source", model, "--output", work / form, "--ckpt-format", form, *more)
        for path in (work / form).rglob("manifest.json"):
            manifest = json.loads(path.read_text())
            write_json(path, sealed({**manifest, "files": {}}))  # so that a file's checksum does not catch it first
    for source, damages in (
        (model, model_damages()),
        (sharded, sharded_damages()),
        (work / "torch_dist", torch_dist_damages()),
        (work / "torch", torch_damages()),
    ):
        for name, damage in damages:
            attempt(name, source, damage, model, work)
    print("done")


def attempt(name: str, source: Path, damage: Damage, model: Path, work: Path) -> None:
    damaged, out = work / "damaged", work / "out" / "result"
    out.parent.mkdir()
    shutil.copytree(source, damaged)
    damage(damaged)
    try:
        if (source / "config.json").exists():
            call(convert.main, "--source", damaged, "--output", out)
        else:
            call(export.main, "--load", damaged, "--hf-dir", model, "--output", out)
        # Only what hits no weight may go through.
        tiny.assert_same_weights(out, model)
        print(f"accepted {source.name} {name}")
    except UserError as error:
        message = str(error)
        left = [path.name for path in out.parent.iterdir()]
        assert not left, f"{name} left {left}"
        assert "\n" not in message, message
        print(f"refused {source.name} {name}: {message}", flush=True)
    shutil.rmtree(damaged)
    shutil.rmtree(out.parent)


def call(entry: Callable[[list[str]], int], *arguments: object) -> None:
    entry([*map(str, arguments)])


if __name__ == "__main__":
    main()
