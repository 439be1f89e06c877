"""The folder of a run's checkpoints: `iter_0000010/` a checkpoint, and the tracker file that names the newest.

A checkpoint is written beside its place and renamed; its manifest, with a checksum of every file, is written last. So a
folder with a manifest is whole, and the tracker never names one that is not.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
TORCH_DIST, TORCH = "torch_dist", "torch"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk. `manifest` is {} for one that another program wrote."""

    path: Path
    iteration: int
    format: str
    manifest: dict[str, Any]


def iteration_path(root: Path, iteration: int) -> Path:
    """`root/iter_0000010` for iteration 10."""
    return root / f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations that `root` has folders of, whole or not, the newest first."""
    names = (path.name[5:] for path in root.glob("iter_*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def latest_iteration(root: Path) -> int | None:
    """The iteration that the tracker names, None if there is no tracker."""
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{tracker} says {text[:40]!r} where an iteration is expected: name the ITERATION to use")
    return int(text)


def open_checkpoint(root: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint of `root` (a folder with a tracker, or an iter_ folder itself); the newest, or that of `iteration`."""
    if not root.is_dir():
        raise UserError(f"checkpoint folder {root} does not exist: run scripts/2_convert.sh, or mend the path")
    if root.name.startswith("iter_") and root.name[5:].isdecimal() and not (root / TRACKER).exists():
        return _open(root, int(root.name[5:]))
    if iteration is None:
        iteration = latest_iteration(root)
        if iteration is None:
            raise UserError(f"{root} has no {TRACKER}: is it a folder of Megatron checkpoints?")
    path = iteration_path(root, iteration)
    if not path.is_dir():
        raise UserError(
            f"{root} has no checkpoint of iteration {iteration}: there are {iterations(root)[::-1] or 'none'}"
        )
    return _open(path, iteration)


def _open(path: Path, iteration: int) -> Checkpoint:
    manifest: dict[str, Any] = {}
    if (path / MANIFEST).exists():
        advice = "take another iteration or convert again"
        manifest = read_json(path / MANIFEST, "checkpoint manifest", advice)
        if not isinstance(manifest, dict) or not seal_holds(manifest):
            raise UserError(f"{path / MANIFEST} is damaged (its checksum of itself differs): {advice}")
    if (path / ".metadata").exists():
        return Checkpoint(path, iteration, TORCH_DIST, manifest)
    if any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return Checkpoint(path, iteration, TORCH, manifest)
    raise UserError(
        f"{path} holds no checkpoint (neither .metadata nor mp_rank_*): take another iteration or convert again"
    )


def verify_files(checkpoint: Checkpoint) -> None:
    """Compare every file's size and SHA-256 with the manifest. The first that differs is a `UserError`."""
    manifest, advice = checkpoint.path / MANIFEST, "take another checkpoint"
    if not checkpoint.manifest:
        # Another program's, or one of this project's that lost it.
        print(f"warning: {manifest} is missing: the files are used without comparing them with checksums", flush=True)
        return
    files = listed_files(checkpoint.path, manifest, checkpoint.manifest.get("files"))
    check_sizes(files, advice)
    check_sums(files, advice)


def write_checkpoint(root: Path, iteration: int, manifest: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Write a checkpoint with all processes: `write(folder)` on each, then checksums, manifest, rename and tracker on one.

    Returns the finished folder. An error in `write` on any rank is raised and leaves the tracker as it was.
    """
    final, beside = iteration_path(root, iteration), unfinished_path(root, iteration)
    first = torch.distributed.get_rank() == 0
    if first:
        root.mkdir(parents=True, exist_ok=True)
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
    torch.distributed.barrier()
    write(beside)
    torch.distributed.barrier()
    if first:
        _finish(root, iteration, beside, manifest)
    torch.distributed.barrier()
    return final


def _finish(root: Path, iteration: int, beside: Path, manifest: dict[str, Any]) -> None:
    paths = sorted(path for path in beside.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_flushed_sum, paths))
    names = [str(path.relative_to(beside)) for path in paths]
    files = {n: {"bytes": p.stat().st_size, "sha256": s} for n, p, s in zip(names, paths, sums, strict=True)}
    for folder in {path.parent for path in paths}:
        sync_folder(folder)
    put_in_place(root, iteration, beside, {**manifest, "files": files})


def _flushed_sum(path: Path) -> str:
    checksum = sha256_of_file(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return checksum


def put_in_place(root: Path, iteration: int, beside: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest into a folder of flushed files, give the folder its name, and then name it in the tracker."""
    final = iteration_path(root, iteration)
    write_json(beside / MANIFEST, sealed({**manifest, "iteration": iteration}))
    sync_folder(beside)
    if final.exists():
        # Only a damaged or unwanted one can be here: a valid newest checkpoint is never written again.
        old = root / f".iter_{iteration:07d}.replaced"
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
        beside.rename(final)
        sync_folder(root)
        shutil.rmtree(old)
    else:
        beside.rename(final)
        sync_folder(root)
    write_text(root / TRACKER, str(iteration))
    sync_folder(root)
    return final


def unfinished_path(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return root / f".iter_{iteration:07d}.unfinished"


def clear_leftovers(root: Path) -> None:
    """Remove what a save or a removal that was broken off has left."""
    for ending in ("unfinished", "replaced", "removed"):
        for path in root.glob(f".iter_*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(f".{TRACKER}.*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Names, sizes and headers of the parts; what a file system itself takes.
_OVERHEAD = 1.01


def checkpoints_to_delete(iterations_there: list[int], newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Iterations that may go now that `newest` is whole. 0 keeps all, or none for good."""
    if keep_last <= 0:
        return []
    older = sorted((i for i in iterations_there if i < newest), reverse=True)
    return [i for i in older[keep_last - 1 :] if not (keep_every > 0 and i % keep_every == 0)]


def remove_old_checkpoints(root: Path, newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Remove the checkpoints that are not kept. Call it when `newest` is whole and the tracker names it."""
    # One without a manifest is not this run's, or is damaged: it neither counts nor is touched.
    whole = [i for i in iterations(root) if (iteration_path(root, i) / MANIFEST).is_file()]
    gone = checkpoints_to_delete(whole, newest, keep_last, keep_every)
    for iteration in gone:
        # Under another name first: a removal that is broken off leaves nothing that looks like a checkpoint.
        path = iteration_path(root, iteration)
        doomed = root / f".{path.name}.removed"
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
    return gone


def check_room(root: Path, num_bytes: int, iteration: int) -> None:
    """A `UserError` if the disk has no room for one more checkpoint; those that go afterwards are still there then."""
    replaced = iteration_path(root, iteration)
    what = f"the checkpoint of iteration {iteration}" + (" (beside the damaged one)" if replaced.exists() else "")
    check_free_space(root, int(num_bytes * _OVERHEAD) + (1 << 20), what)
