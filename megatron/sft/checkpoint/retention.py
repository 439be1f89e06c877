"""Which checkpoints of a run are kept (KEEP_LAST, KEEP_EVERY), and whether the disk has room for the next."""

import shutil
from pathlib import Path

from megatron.sft.checkpoint.folder import MANIFEST, iteration_path, iterations
from megatron.sft.disk_space import check_free_space

# Names, sizes and headers of the parts; what a file system itself takes.
_OVERHEAD = 1.01


def superfluous(iterations_there: list[int], newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Iterations that may go now that `newest` is whole. 0 keeps all, or none for good."""
    if keep_last <= 0:
        return []
    older = sorted((i for i in iterations_there if i < newest), reverse=True)
    return [i for i in older[keep_last - 1 :] if not (keep_every > 0 and i % keep_every == 0)]


def remove_superfluous(root: Path, newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Remove the checkpoints that are not kept. Call it when `newest` is whole and the tracker names it."""
    # One without a manifest is not this run's, or is damaged: it neither counts nor is touched.
    whole = [i for i in iterations(root) if (iteration_path(root, i) / MANIFEST).is_file()]
    gone = superfluous(whole, newest, keep_last, keep_every)
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
