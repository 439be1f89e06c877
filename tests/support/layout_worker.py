"""Continues saved runs in every parallel layout of as many processes as it is started in, for test_checkpoint_layouts.py.

torchrun … layout_worker.py TARGETS SOURCES OUT CONVERTED DATA [OPTION…]: names of layouts of LAYOUTS separated by commas, the
folder with a run saved in each source layout, where to write, more options of the runs.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron.sft.checkpoint.metadata_file import read_metadata
from megatron.sft.checkpoint.reading import read_chunk
from megatron.sft.model import process_groups
from megatron.sft.planning.options import parse
from megatron.sft.planning.resolution import plan_run
from megatron.sft.runtime import device, ranks

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1x1": (1, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP2": (2, []),
    "TP2xPP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}
SAVED, STEPS = 3, 13
OPTIONS = ["--precision", "fp32", "--lr", "1e-3", "--min-lr", "1e-4", "--train-iters", str(STEPS)]
OPTIONS += ["--save-interval", str(SAVED)]
OPTIONS += ["--global-batch-size", "8", "--micro-batch-size", "2"]


def main() -> None:
    targets, sources, out, converted, data = sys.argv[1].split(","), *map(Path, sys.argv[2:6])
    more = sys.argv[6:]
    with device.process_group():
        for target in targets:
            for source in sorted(sources.iterdir()):
                run = out / f"{source.name} to {target}"
                if ranks.is_rank_0():
                    keep_first_checkpoint(source, run)
                torch.distributed.barrier()
                arguments = ["--load", converted, "--data-path", data, "--save", run, *OPTIONS, *LAYOUTS[target][1], *more]
                losses = continue_run([str(argument) for argument in arguments], run)
                if ranks.is_rank_0():
                    (run / "losses.json").write_text(json.dumps(losses))


def keep_first_checkpoint(source: Path, run: Path) -> None:
    """A copy of a run as it was after SAVED steps."""
    run.mkdir(parents=True)
    name = f"iter_{SAVED:07d}"
    shutil.copytree(source / name, run / name)
    (run / "latest_checkpointed_iteration.txt").write_text(str(SAVED))


def continue_run(arguments: list[str], run: Path) -> list[float]:
    """Resume, save at once what was loaded under "again", and train on; returns the losses."""
    from megatron.sft.training import state
    from megatron.sft.training.engine import Engine
    from megatron.sft.training.feeder import Feeder
    from megatron.sft.training.saver import Saver

    plan = plan_run(*parse(["resume", *arguments]), num_processes=torch.distributed.get_world_size())
    with process_groups.model_parallel(plan.layout, plan.options.seed):
        engine = Engine(plan)
        iteration, consumed = state.load(engine)
        saver = Saver(engine)
        saver._root = run / "again"
        saver.save(iteration, consumed)
        saver.finish()
        feeder, losses = Feeder(plan), []
        while iteration < STEPS:
            losses.append(engine.train_step(feeder.training(consumed)).loss.reduce()[0])
            iteration, consumed = iteration + 1, consumed + plan.options.global_batch_size
    return losses


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole: weights, master weights and moments."""
    metadata, tensors = read_metadata(folder), {}
    for key, facts in metadata.state_dict_metadata.items():
        if isinstance(facts, TensorStorageMetadata) and not key.startswith("random."):
            tensors[key] = torch.full(facts.size, float("nan"), dtype=facts.properties.dtype)
            for chunk in facts.chunks:
                place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                tensors[key][place] = read_chunk(folder, metadata, key, chunk)
    return tensors


if __name__ == "__main__":
    main()
