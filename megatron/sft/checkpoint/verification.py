"""Whether a checkpoint is whole, and which checkpoint of a run is the newest whole one.

Names, sizes and the manifest are checked first, which takes a moment and no communication. The checksums take as long as
reading the files: all processes share that, and agree on the result before anything is loaded.
"""

import time
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint.folder import MANIFEST, TORCH, TORCH_DIST, TRACKER, Checkpoint, iteration_path, iterations
from megatron.sft.checkpoint.shard_slice import balanced
from megatron.sft.runtime import ranks, watchdog
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import Files, check_sizes, check_sums, listed_files, read_json, seal_holds, write_text

_ADVICE = "the checkpoint is not used"


def has_checkpoints(root: Path) -> bool:
    """Whether a run has written checkpoints there, whole or not."""
    return bool(iterations(root)) or (root / TRACKER).exists()


def newest_checkpoint(root: Path, below: int | None = None) -> Checkpoint:
    """The newest checkpoint of a run (before iteration `below`) whose manifest and sizes are right.

    Reports which newer ones are skipped and why, and what is wrong with the tracker. A `UserError` if none is whole.
    """
    problems: list[str] = []
    for iteration in iterations(root):
        if below is not None and iteration >= below:
            continue
        checkpoint = _whole(root, iteration, problems)
        if checkpoint is not None:
            for problem in problems:
                ranks.print_rank_0(f"warning: {problem}: taking iteration {iteration} instead")
            if below is None:
                _compare_tracker(root, iteration, bool(problems))
            return checkpoint
    reason = problems[0] if problems else f"{root} has no older checkpoint"
    raise UserError(
        f"{reason}, and no other checkpoint in {root} is whole: restore one from a copy, or train in another OUTPUT_PATH"
    )


def _whole(root: Path, iteration: int, problems: list[str]) -> Checkpoint | None:
    """The checkpoint if its manifest, names and sizes are right; else what is wrong is appended to `problems`."""
    path = iteration_path(root, iteration)
    try:
        if not path.is_dir():
            raise UserError(f"{root} has a folder of iteration {iteration} under another name than {path.name}")
        manifest = read_json(path / MANIFEST, "checkpoint manifest", "it is not whole")
        check_checkpoint_manifest(path, manifest, iteration)
        files = listed_files(path, path / MANIFEST, manifest["files"])
        check_sizes(files, _ADVICE)
        _check_names(path, files)
    except (UserError, OSError) as error:
        problems.append(str(error))
        return None
    return Checkpoint(path, iteration, manifest["checkpoint_format"], manifest)


def check_checkpoint_manifest(path: Path, manifest: Any, iteration: int) -> None:
    """A `UserError` if the manifest is not as it was written, or belongs to another checkpoint."""
    where = path / MANIFEST
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or not seal_holds(manifest):
        raise UserError(f"{where} is damaged (the checksum of its content differs)")
    if manifest.get("iteration") != iteration:
        raise UserError(f"{where} belongs to iteration {manifest.get('iteration')}, not to {iteration}")
    if manifest.get("checkpoint_format") not in (TORCH_DIST, TORCH):
        raise UserError(f"{where} names no known format")


def _check_names(path: Path, files: Files) -> None:
    """A `UserError` for a file that is not in the manifest, such as another checkpoint's."""
    there = {file for file in path.rglob("*") if not file.is_dir()}
    extra = sorted(there - files.keys() - {path / MANIFEST})
    if extra:
        raise UserError(f"{extra[0]} is not in the manifest next to it: remove it if it is yours")


def _compare_tracker(root: Path, iteration: int, warned: bool) -> None:
    """Warn if the tracker does not name the newest whole checkpoint. Only other programs depend on the tracker."""
    tracker = root / TRACKER
    text = tracker.read_text(errors="replace").strip()[:40] if tracker.is_file() else None
    if text == str(iteration) or (warned and text is not None and text.isdecimal() and int(text) in iterations(root)):
        return
    says = "is missing" if text is None else f"says {text!r}"
    ranks.print_rank_0(f"warning: {tracker} {says}: taking iteration {iteration}, the newest whole one")


def repair_tracker(root: Path, iteration: int) -> None:
    """Make the tracker name the checkpoint that the run continues from."""
    tracker = root / TRACKER
    if not tracker.is_file() or tracker.read_text(errors="replace").strip() != str(iteration):
        write_text(tracker, str(iteration))


def checked_run(checkpoint: Checkpoint) -> Checkpoint:
    """Verify the checksums of the checkpoint that a run continues from, with all processes of the initialized group.

    Returns an older checkpoint if it is damaged, the same on every rank; a `UserError` if none is whole.
    """
    started, num_bytes = time.monotonic(), 0
    while True:
        num_bytes += sum(file["bytes"] for file in checkpoint.manifest["files"].values())
        problem = _agreed_problem(checkpoint)
        if problem is None:
            break
        ranks.print_rank_0(f"warning: {problem}")
        checkpoint = newest_checkpoint(checkpoint.path.parent, below=checkpoint.iteration)
        ranks.print_rank_0(f"warning: taking iteration {checkpoint.iteration} instead")
    seconds = time.monotonic() - started
    ranks.print_rank_0(
        f"verified {checkpoint.path} in {seconds:.1f} s ({num_bytes / 1e9:.2f} GB; VERIFY_CHECKPOINT=0 skips this)"
    )
    if ranks.is_rank_0():
        repair_tracker(checkpoint.path.parent, checkpoint.iteration)
    return checkpoint


def _agreed_problem(checkpoint: Checkpoint) -> str | None:
    """The problem that the lowest rank found, None if no rank found any; the same on every rank."""
    import torch

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    watchdog.enter("verification")
    problem = ""
    try:
        files = listed_files(checkpoint.path, checkpoint.path / MANIFEST, checkpoint.manifest["files"])
        paths = list(files)
        share = balanced([files[path]["bytes"] for path in paths], world)[rank]
        check_sums({paths[index]: files[paths[index]] for index in share}, _ADVICE, lambda num_bytes: watchdog.touch())
    except UserError as error:
        problem = str(error)
    found: list[tuple[str, str]] = [("", "")] * world
    torch.distributed.all_gather_object(found, (checkpoint.path.name, problem))
    names = sorted({name for name, _ in found})
    if len(names) > 1:
        raise UserError(
            f"the processes see different checkpoints in {checkpoint.path.parent} ({', '.join(names)}): "
            "give an OUTPUT_PATH that all nodes share"
        )
    return next((text for _, text in found if text), None)
