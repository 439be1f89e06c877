"""The folder of a run's checkpoints: `iter_0000010/` a checkpoint, and the tracker file that names the newest.

A checkpoint is written under a temporary name and renamed; its manifest, with a checksum of every file, is written last. So a
folder with a manifest is whole, and the tracker never names one that is not.
"""

import json
import os
import shlex
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.sft.hf.names import similar_folder
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import (
    check_free_space,
    check_sizes,
    check_sums,
    listed_files,
    read_json,
    seal_holds,
    sealed,
    sha256_of_file,
    write_json,
    write_text,
)

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
BEST = "best_checkpoint.json"  # names the checkpoint with the lowest validation loss, which KEEP_LAST spares
TORCH_DIST, TORCH = "torch_dist", "torch"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk. `format` is TORCH_DIST or TORCH; `manifest` is {} for one that another program wrote."""

    path: Path
    iteration: int
    format: str
    manifest: dict[str, Any]


def iteration_path(root: Path, iteration: int) -> Path:
    """`root/iter_0000010` for iteration 10."""
    return root / f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations of the checkpoint folders in `root`, whole or not, the newest first."""
    names = (path.name[5:] for path in root.glob("iter_*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def latest_iteration(root: Path) -> int | None:
    """The iteration that the tracker names, None if there is no tracker. A tracker without a number is a `UserError`."""
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{tracker} says {text[:40]!r} where an iteration is expected: name the ITERATION to use")
    return int(text)


def open_checkpoint(root: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint of `iteration`, or of the iteration in the tracker. `root`: a folder with a tracker, or an iter_ folder.

    Only the manifest is read. A missing checkpoint and a damaged manifest are a `UserError`.
    """
    if not root.is_dir():
        raise UserError(
            f"checkpoint folder {root} does not exist{similar_folder(root)}: run scripts/2_convert.sh, or correct the path"
        )
    if root.name.startswith("iter_") and root.name[5:].isdecimal() and not (root / TRACKER).exists():
        return _open(root, int(root.name[5:]))
    if iteration is None:
        iteration = latest_iteration(root)
        if iteration is None and (root / "config.json").is_file():
            raise UserError(
                f"{root} is a Hugging Face folder: convert it with bash scripts/2_convert.sh {shlex.quote(str(root))} 1 1, and "
                f"give {root}_Megatron_TP1PP1"
            )
        if iteration is None:
            raise UserError(f"{root} has no {TRACKER}: is it a folder of Megatron checkpoints?")
    path = iteration_path(root, iteration)
    if not path.is_dir():
        raise UserError(f"{root} has no checkpoint of iteration {iteration}: there are {iterations(root)[::-1] or 'none'}")
    return _open(path, iteration)


def _open(path: Path, iteration: int) -> Checkpoint:
    manifest: dict[str, Any] = {}
    if (path / MANIFEST).exists():
        advice = "take another iteration or convert again"
        manifest = read_json(path / MANIFEST, "checkpoint manifest", advice)
        if not isinstance(manifest, dict) or not seal_holds(manifest):
            raise UserError(f"{path / MANIFEST} is damaged (the checksum of its content differs): {advice}")
    if (path / ".metadata").exists():
        return Checkpoint(path, iteration, TORCH_DIST, manifest)
    if any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return Checkpoint(path, iteration, TORCH, manifest)
    raise UserError(f"{path} holds no checkpoint (neither .metadata nor mp_rank_*): take another iteration or convert again")


def verify_files(checkpoint: Checkpoint) -> None:
    """Compare every file's size and SHA-256 with the manifest. The first file that differs is a `UserError`."""
    manifest, advice = checkpoint.path / MANIFEST, "take another checkpoint"
    if not checkpoint.manifest:
        # Another program wrote the checkpoint, or the manifest was lost.
        print(f"warning: {manifest} is missing: the files are used without verifying their checksums", flush=True)
        return
    files = listed_files(checkpoint.path, manifest, checkpoint.manifest.get("files"))
    check_sizes(files, advice)
    check_sums(files, advice)


def flush_and_hash(folder: Path, known: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Flush all files of an unfinished checkpoint, and their folders, to the disk; returns what the manifest says of them.

    known: names of files that were flushed before, to skip.
    """
    found = (path for path in folder.rglob("*") if path.is_file())
    paths = sorted(path for path in found if str(path.relative_to(folder)) not in known)
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_flushed_sum, paths))
    for parent in {path.parent for path in paths}:
        sync_folder(parent)
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, sums, strict=True)
    }


def _flushed_sum(path: Path) -> str:
    checksum = sha256_of_file(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return checksum


def put_in_place(root: Path, iteration: int, staged: Path, manifest: dict[str, Any]) -> Path:
    """Finish a checkpoint: write the manifest into the folder of flushed files, rename the folder, update the tracker."""
    final = iteration_path(root, iteration)
    write_json(staged / MANIFEST, sealed({**manifest, "iteration": iteration}))
    sync_folder(staged)
    if final.exists():
        # A damaged or unwanted checkpoint: a valid newest one is never written again.
        old = root / f".iter_{iteration:07d}.replaced"
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
        staged.rename(final)
        sync_folder(root)
        shutil.rmtree(old)
    else:
        staged.rename(final)
        sync_folder(root)
    write_text(root / TRACKER, str(iteration))
    sync_folder(root)
    return final


def unfinished_path(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is renamed."""
    return root / f".iter_{iteration:07d}.unfinished"


def clear_leftovers(root: Path) -> None:
    """Remove what an interrupted save or removal has left."""
    for ending in ("unfinished", "replaced", "removed"):
        for path in root.glob(f".iter_*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(f".{TRACKER}.*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """fsync the directory so that its entries are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_best(root: Path, iteration: int, validation_loss: float) -> None:
    """Name the best checkpoint."""
    write_json(root / BEST, {"iteration": iteration, "validation_loss": validation_loss})


def best_iteration(root: Path) -> int | None:
    """The iteration that `write_best` named; None if there is none, or if the file is damaged."""
    try:
        return int(json.loads((root / BEST).read_text(encoding="utf-8"))["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# A checkpoint takes this times the bytes of its tensors: headers, index, blocks of the file system.
_OVERHEAD = 1.01


def checkpoints_to_delete(iterations_there: list[int], newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Iterations to delete now that `newest` is whole: all but the newest `keep_last` and the multiples of `keep_every`.

    `keep_last` 0 keeps all of them, `keep_every` 0 keeps none for good.
    """
    if keep_last <= 0:
        return []
    older = sorted((i for i in iterations_there if i < newest), reverse=True)
    return [i for i in older[keep_last - 1 :] if not (keep_every > 0 and i % keep_every == 0)]


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay when a newer one is whole: as `checkpoints_to_delete` takes them, and those in `spared`."""

    last: int = 0
    every: int = 0
    spared: frozenset[int] = frozenset()


def remove_old_checkpoints(root: Path, newest: int, kept: Kept) -> list[int]:
    """Delete checkpoints by the rule of `checkpoints_to_delete` but the best one; returns their iterations.

    Call it when `newest` is whole and the tracker names it.
    """
    # A checkpoint without a manifest is damaged or another program's: it neither counts nor is touched.
    whole = [i for i in iterations(root) if (iteration_path(root, i) / MANIFEST).is_file()]
    spared = kept.spared | {best_iteration(root)}
    deleted = [i for i in checkpoints_to_delete(whole, newest, kept.last, kept.every) if i not in spared]
    for iteration in deleted:
        # Renamed first: an interrupted removal leaves nothing that looks like a checkpoint.
        path = iteration_path(root, iteration)
        doomed = root / f".{path.name}.removed"
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
    return deleted


def check_room(root: Path, num_bytes: int, iteration: int) -> None:
    """A `UserError` if the disk has no room for one more checkpoint: old ones are deleted only when it is whole."""
    replaced = iteration_path(root, iteration)
    what = f"the checkpoint of iteration {iteration}" + (" (next to the damaged one)" if replaced.exists() else "")
    check_free_space(root, int(num_bytes * _OVERHEAD) + (1 << 20), what)
