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

from megatron.sft.errors import UserError
from megatron.sft.manifest import read_json, sha256_of_file, write_json, write_text

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
        there = sorted(int(p.name[5:]) for p in root.glob("iter_*") if p.name[5:].isdecimal())
        raise UserError(f"{root} has no checkpoint of iteration {iteration}: there are {there or 'none'}")
    return _open(path, iteration)


def _open(path: Path, iteration: int) -> Checkpoint:
    manifest: dict[str, Any] = {}
    if (path / MANIFEST).exists():
        manifest = read_json(path / MANIFEST, "checkpoint manifest", "take another iteration or convert again")
    if (path / ".metadata").exists():
        return Checkpoint(path, iteration, TORCH_DIST, manifest)
    if any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return Checkpoint(path, iteration, TORCH, manifest)
    raise UserError(
        f"{path} holds no checkpoint (neither .metadata nor mp_rank_*): take another iteration or convert again"
    )


def verify_files(checkpoint: Checkpoint) -> None:
    """Compare every file's size and SHA-256 with the manifest. The first that differs is a `UserError`."""
    files: dict[str, dict[str, Any]] = checkpoint.manifest.get("files", {})
    for name, wanted in files.items():
        path = checkpoint.path / name
        if not path.resolve().is_relative_to(checkpoint.path.resolve()):
            raise UserError(f"{checkpoint.path / MANIFEST} names {name!r}, which lies outside the checkpoint")
        size = path.stat().st_size if path.exists() else None
        if size != wanted["bytes"]:
            raise UserError(f"{path} has {size} bytes, the manifest says {wanted['bytes']}: take another checkpoint")
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: sha256_of_file(checkpoint.path / name), files)
        for name, checksum in zip(files, sums, strict=True):
            if checksum != files[name]["sha256"]:
                raise UserError(f"{checkpoint.path / name} is damaged (its checksum differs): take another checkpoint")


def write_checkpoint(root: Path, iteration: int, manifest: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Write a checkpoint with all processes: `write(folder)` on each, then checksums, manifest, rename and tracker on one.

    Returns the finished folder. An error in `write` on any rank is raised and leaves the tracker as it was.
    """
    final, beside = iteration_path(root, iteration), root / f".iter_{iteration:07d}.unfinished"
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
        _finish(root, iteration, beside, final, manifest)
    torch.distributed.barrier()
    return final


def _finish(root: Path, iteration: int, beside: Path, final: Path, manifest: dict[str, Any]) -> None:
    names = sorted(str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda name: sha256_of_file(beside / name), names))
    files = {n: {"bytes": (beside / n).stat().st_size, "sha256": s} for n, s in zip(names, sums, strict=True)}
    write_json(beside / MANIFEST, {**manifest, "iteration": iteration, "files": files})
    if final.exists():
        # Only a damaged or unwanted one can be here: a valid newest checkpoint is never written again.
        old = root / f".iter_{iteration:07d}.replaced"
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
        beside.rename(final)
        shutil.rmtree(old)
    else:
        beside.rename(final)
    descriptor = os.open(root, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    write_text(root / TRACKER, str(iteration))
