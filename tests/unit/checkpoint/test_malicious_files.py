"""Files made to do harm: none of them runs anything, writes outside the output folder, or takes the machine's memory.

`tests/support/malicious.py` makes them; `test_the_pickles_are_live` shows that they do run where they are read without care.
"""

import contextlib
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron.sft import export
from megatron.sft.checkpoint import torch_file
from megatron.sft.checkpoint.folder import open_checkpoint
from megatron.sft.checkpoint.metadata_file import read_metadata
from megatron.sft.checkpoint.reading import SliceReader
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.runtime.errors import UserError
from tests.support import malicious, tiny

NAMES = list(malicious.pickles(Path("mark")))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """2 GiB more than the process has; what asks for more fails instead of harming the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_pickles_are_live(tmp_path: Path) -> None:
    script = tmp_path / "load.py"
    script.write_text(
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(tiny.ROOT)!r})\n"
        "from tests.support import malicious\n"
        "mark = pathlib.Path(sys.argv[1])\n"
        "for name, content in malicious.pickles(mark).items():\n"
        "    mark.unlink(missing_ok=True)\n"
        "    try: malicious.pickle.loads(content)\n"
        "    except Exception: pass\n"
        "    if mark.exists(): print(name)\n"
    )
    result = subprocess.run([sys.executable, script, tmp_path / "mark"], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == NAMES, result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_of_a_checkpoint_is_executed(name: str, converted: Path, tmp_path: Path, mark: Path) -> None:
    """The same payload in each of the four kinds of file that are pickles, and as one value among a checkpoint's."""
    content = malicious.pickles(mark)[name]
    folder = tmp_path / "iter_0000001"
    shutil.copytree(converted / "iter_0000001", folder)
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="damaged or not to be trusted"):
        read_metadata(folder)
    (folder / "common.pt").write_bytes(content)
    path = folder / "__0_0.distcp"
    path.write_bytes(malicious.archive(content))
    with pytest.raises(UserError, match=str(path)):
        torch_file.read_tensor(path, 0, path.stat().st_size)
    for whole in (content, malicious.archive(content)):
        path.write_bytes(whole)
        with contextlib.suppress(UserError):  # some are read, with a record in place of what they ask for
            torch_file.read(path)


def test_a_tensor_that_is_called_an_object_is_not_unpickled(
    converted: Path, tiny_qwen2: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's loader unpickles what .metadata calls an object, whatever was asked for: here a parameter is one."""
    folder = tmp_path / "checkpoint" / "iter_0000001"
    shutil.copytree(converted / "iter_0000001", folder)
    content = malicious.archive(malicious.pickles(mark)["os.system"])
    (folder / "evil.distcp").write_bytes(content)
    metadata = read_metadata(folder)
    key = "decoder.final_layernorm.weight"
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    disguise = BytesStorageMetadata()
    disguise.size = stored.size  # type: ignore[attr-defined]  # what megatron-core compares first
    metadata.state_dict_metadata[key] = disguise
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("evil.distcp", 0, len(content))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    malicious.forge_manifest(folder, {})
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("1")
    wanted = ShardSlice(key, (0,), (64,), (64,), torch.float32, lambda: torch.zeros(64))
    with pytest.raises(UserError, match=key):
        SliceReader(folder).fill([wanted])
    with pytest.raises(UserError, match=key):
        malicious.call_main(
            monkeypatch, export.main, "--load", folder.parent, "--hf-dir", tiny_qwen2, "--output", tmp_path / "out"
        )


@pytest.mark.parametrize("name", malicious.bombs())
@pytest.mark.usefixtures("little_memory")
def test_small_pickles_do_not_take_the_memory(name: str, converted: Path, tmp_path: Path) -> None:
    content = malicious.bombs()[name]
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError):
        read_metadata(folder)
    path = tmp_path / "model_optim_rng.pt"
    path.write_bytes(malicious.archive(content))
    with pytest.raises(UserError):
        torch_file.read_tensor(path, 0, path.stat().st_size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak < 8 << 20, f"{peak} KiB"


TENSORS = {
    "more values than bytes": malicious.tensor_pickle((1 << 40,), (1,)),
    "one value a thousand times": malicious.tensor_pickle((1000, 1000), (0, 0)),
    "a negative size": malicious.tensor_pickle((-4,), (1,)),
    "beyond the storage": malicious.tensor_pickle((2, 2), (9, 9)),
    "of no storage": malicious.tensor_pickle((1,), (1,), storage=b"K\x07"),
    "of a storage in another file": malicious.tensor_pickle((1,), (1,), storage=malicious.text("../../x") + b"Q"),
    "of a function": malicious.tensor_pickle((1,), (1,), storage=malicious.named("os", "system")),
}
ARCHIVES = {
    "compressed": malicious.archive(malicious.tensor_pickle((1,), (1,)), b"\0" * 4_000_000, deflated=True),
    "a name outside": malicious.archive(malicious.tensor_pickle((1,), (1,)), b"\0" * 4, names=("../../outside",)),
    "an absolute name": malicious.archive(malicious.tensor_pickle((1,), (1,)), b"\0" * 4, names=("/tmp/outside",)),
    "no archive": b"PK\x03\x04" + b"\0" * 200,
    "nothing": b"",
    **{name: malicious.archive(content, b"\0" * 16) for name, content in TENSORS.items()},
}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.usefixtures("little_memory")
def test_archives_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "inner" / "model_optim_rng.pt"
    path.parent.mkdir()
    path.write_bytes(ARCHIVES[name])
    with pytest.raises(UserError, match=str(path)):
        torch_file.read_tensor(path, 0, len(ARCHIVES[name]))
    with pytest.raises(UserError, match=str(path)):
        torch_file.read(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "model_optim_rng.pt"]


def metadata_edits(outside: Path) -> dict[str, Callable[[Metadata, Path], object]]:
    def place(metadata: Metadata, **changes: Any) -> None:
        index = next(iter(metadata.storage_data))
        metadata.storage_data[index] = _StorageInfo(**{**vars(metadata.storage_data[index]), **changes})

    def link(metadata: Metadata, folder: Path) -> None:
        (folder / "__0_0.distcp").unlink()
        (folder / "__0_0.distcp").symlink_to(outside)

    def stored(metadata: Metadata) -> TensorStorageMetadata:
        return next(v for v in metadata.state_dict_metadata.values() if isinstance(v, TensorStorageMetadata))

    return {
        "a path upwards": lambda m, f: place(m, relative_path="../outside"),
        "an absolute path": lambda m, f: place(m, relative_path=str(outside)),
        "a folder": lambda m, f: place(m, relative_path="."),
        "no path": lambda m, f: place(m, relative_path=""),
        "a NUL": lambda m, f: place(m, relative_path="a\0b"),
        "a link outside": link,
        "a negative offset": lambda m, f: place(m, offset=-8),
        "bytes beyond the file": lambda m, f: place(m, length=1 << 40),
        "a transform": lambda m, f: place(m, transform_descriptors=["zstd"]),
        "a size of the universe": lambda m, f: setattr(stored(m), "size", torch.Size([1 << 50, 1 << 50])),
        "text for a size": lambda m, f: setattr(stored(m), "size", "many"),
        "a chunk outside": lambda m, f: setattr(stored(m).chunks[0], "offsets", torch.Size([9999] * len(stored(m).size))),
        "no chunks": lambda m, f: stored(m).chunks.clear(),
        "a chunk twice": lambda m, f: stored(m).chunks.append(stored(m).chunks[0]),
        "a list of tensors": lambda m, f: setattr(m, "state_dict_metadata", [1]),
        "a number for a name": lambda m, f: m.state_dict_metadata.update({7: stored(m)}),
        "no places": lambda m, f: setattr(m, "storage_data", None),
    }  # fmt: skip


@pytest.mark.parametrize("name", metadata_edits(Path()))
def test_metadata_that_points_elsewhere_is_refused(
    name: str, converted: Path, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    shutil.copy(converted / "iter_0000001" / "__0_0.distcp", outside)
    root = tmp_path / "checkpoint"
    shutil.copytree(converted, root)
    folder = root / "iter_0000001"
    metadata = read_metadata(folder)
    metadata_edits(outside)[name](metadata, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    malicious.forge_manifest(folder, {})
    with pytest.raises(UserError, match="iter_0000001"):
        malicious.call_main(
            monkeypatch, export.main, "--load", root, "--hf-dir", tiny_qwen2, "--output", tmp_path / "out" / "model"
        )
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "\0", "link/x"])
def test_a_checkpoints_manifest_names_nothing_outside(
    name: str, converted: Path, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(converted, root)
    folder = root / "iter_0000001"
    (folder / "link").symlink_to("/etc")
    malicious.forge_manifest(folder, {name: {"bytes": 4, "sha256": "0" * 64}})
    with pytest.raises(UserError, match=r"manifest.json|iter_0000001"):
        malicious.call_main(monkeypatch, export.main, "--load", root, "--hf-dir", tiny_qwen2, "--output", tmp_path / "out")


@pytest.mark.parametrize("said", ["../../outside", "1\n2", "-1", "1e3", "99999999999999999999", "٣", "", "\0"])
def test_a_tracker_names_an_iteration_and_nothing_else(said: str, converted: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(converted, root)
    (root / "latest_checkpointed_iteration.txt").write_text(said)
    with pytest.raises(UserError, match=str(root)):
        open_checkpoint(root)


def test_a_checkpoint_with_fewer_layers_than_the_model_is_refused(converted: Path) -> None:
    """A slice beyond the stored tensor is never returned unfilled."""
    reader = SliceReader(converted / "iter_0000001")
    key = "decoder.layers.mlp.linear_fc2.weight"
    layers, *shape = reader.tensors[key].size
    offsets, sizes, whole = (layers, 0, 0), (1, *shape), (layers + 1, *shape)
    for use in (reader.read, lambda wanted: reader.fill([wanted])):
        with pytest.raises(UserError, match=key):
            use(ShardSlice(key, offsets, sizes, whole, torch.float32, lambda: torch.zeros(sizes)))
