"""Losses of every parallel layout beside those of one process, through the real engine: a table, and status 1 if any differs.

python -m tests.campaigns.parallel_losses [--set cpu|gpu|device] [--only NAME ...] [--steps N] [--output FILE] [--against FILE]

cpu: gloo, float32, up to four processes. gpu: one GPU and two (and four, where there are so many) over NCCL, bfloat16 and
float32, with Transformer Engine where it is installed and without. device: the CPU against one GPU.
MEGATRON_SFT_DEVICE=cpu keeps everything on the CPU. --against: every run beside the same one of another --output, as of another
megatron-core.
"""

import argparse
import faulthandler
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.sft.runtime.signals import StopRequest
from tests.support import layout_material as material
from tests.support import tiny
from tests.support.layout_cases import DPO, FOUR, ON_CPU, ON_GPU, ONE, TWO, Layout, Run, Variant, fits

if TYPE_CHECKING:
    import torch

    from megatron.sft.model.inputs import PackedRows
    from megatron.sft.planning.run_plan import RunPlan

LIMIT_SECONDS = 560  # of one launch, after which every process says where it is
GLOBAL_BATCH, MICRO_BATCH = 8, 2
DEVICE_MODELS = ("plain", "window", "experts")


def plan_of(run: Run, steps: int, folder: Path) -> "RunPlan":
    """What the user's settings would give."""
    from megatron.sft.planning.options import parse
    from megatron.sft.planning.resolution import plan_run

    variant = run.variant
    arguments = ["train", "--load", str(folder / variant.model)]
    arguments += ["--data-path", str(folder / ("pairs" if variant.objective else "rows")), *variant.objective.split()]
    if variant.objective.startswith("--objective dpo"):
        arguments += ["--reference", str(folder / f"{variant.model}_reference")]
        arguments += ["--reference-logps", str(folder / f"logps of {variant.name}, {run.layout.name}")]
    arguments += ["--save", str(folder / "none"), "--precision", variant.precision, "--loss-average", variant.average]
    arguments += ["--lr", "1e-3", "--min-lr", "1e-4", "--train-iters", str(steps), "--split", "80,20,0"]
    arguments += ["--global-batch-size", str(GLOBAL_BATCH), "--micro-batch-size", str(MICRO_BATCH)]
    mode, options = parse([*arguments, *run.layout.options])
    return plan_run(mode, options, run.layout.processes)


def train(run: Run, plan: "RunPlan") -> None:
    """Fill `run`, in every process of its layout."""
    from megatron.sft.training import state
    from megatron.sft.training.engine import Engine
    from megatron.sft.training.feeder import Feeder
    from megatron.sft.training.reference import with_logps

    os.environ["MEGATRON_SFT_TE"] = "1" if run.variant.engine else "0"
    logps = with_logps(plan, StopRequest()).logps if plan.reference else None
    engine = Engine(plan)
    state.load_start(engine)
    least: list[float] = []
    if run.layout.processes == 1:
        record_margins(engine.chunks, least)
    feeder = Feeder(plan, logps)
    for step in range(plan.train_iters):
        result = engine.train_step(feeder.training(step * GLOBAL_BATCH))
        run.losses.append(result.loss.reduce()[0])
        run.norms.append(result.grad_norm)
        run.margins += [min(least)] if least else []
        least.clear()
    run.validation = engine.evaluate(feeder.validation(0)).reduce()[0]


def record_margins(chunks: "Sequence[torch.nn.Module]", least: list[float]) -> None:
    """Let every router append how much better the last chosen expert of any token is than the next one, in logits."""
    from megatron.sft.model.experts.router import Router

    def record(router: Router, given: "tuple[torch.Tensor, PackedRows]", _: object) -> None:
        logits = (given[0].float() @ router.weight.float().t()).detach()
        real = given[1].real
        best = (logits if real is None else logits[real]).topk(router.moe.experts_per_token + 1).values
        least.append(float((best[:, -2] - best[:, -1]).min()))

    for module in itertools.chain.from_iterable(chunk.modules() for chunk in chunks):
        if isinstance(module, Router):
            module.register_forward_hook(record)


def work(task: Path) -> None:
    """In each process of a launch: all runs of the task, one after another, those of one layout in the same groups."""
    from megatron.sft.model import process_groups
    from megatron.sft.runtime import device, ranks

    content = json.loads(task.read_text())
    faulthandler.dump_traceback_later(content["limit"], exit=True)
    runs = list(map(_run, content["runs"]))
    with device.process_group(timeout_minutes=5):
        for _, group in itertools.groupby(runs, lambda run: run.layout.name):
            planned = [(run, plan_of(run, content["steps"], task.parent)) for run in group]
            with process_groups.model_parallel(planned[0][1].layout):
                for run, plan in planned:
                    ranks.print_rank_0(f"  {run.variant.name}, {run.layout.name} …")
                    train(run, plan)
            leave_groups()
    if ranks.is_rank_0():
        task.with_suffix(".done").write_text(json.dumps([asdict(run) for run in runs]))


def leave_groups() -> None:
    """End the groups of a layout, whose threads and connections would stay until the process ends."""
    import torch
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def launch(runs: Sequence[Run], steps: int, folder: Path, on_cpu: bool, limit: float = LIMIT_SECONDS) -> None:
    """Fill runs of one number of processes, in one launch of them."""
    task = folder / f"task_{runs[0].layout.processes}_{'cpu' if on_cpu else 'gpu'}.json"
    task.write_text(json.dumps({"steps": steps, "limit": limit, "runs": [asdict(run) for run in runs]}))
    processes, module = runs[0].layout.processes, "tests.campaigns.parallel_losses"
    run_on = tiny.run if on_cpu else tiny.run_on_gpu
    run_on(processes, module, "--task", task, seconds=limit + 60)
    for run, done in zip(runs, json.loads(task.with_suffix(".done").read_text()), strict=True):
        run.losses, run.norms, run.margins = done["losses"], done["norms"], done["margins"]
        run.validation = done["validation"]


def compare(
    variants: Sequence[Variant],
    layouts: Sequence[Layout],
    steps: int,
    on_cpu: bool,
    limit: float = LIMIT_SECONDS,
    only: Mapping[str, Sequence[str]] | None = None,
) -> list[tuple[Run, Run]]:
    """Every variant in every layout, each with the same variant in one process. One launch a number of processes.

    only: the layouts of each variant, by their names.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material.save_models(folder, {variant.model for variant in variants})
        for name in {variant.model for variant in variants if variant.objective.startswith(DPO)}:
            material.save_reference(folder, name)
        material.write_data(folder, on_cpu)
        runs = [Run(variant, layout) for layout in [ONE, *layouts] for variant in variants if fits(variant, layout)]
        if only is not None:
            runs = [run for run in runs if run.layout == ONE or run.layout.name in only[run.variant.name]]
        for number in sorted({run.layout.processes for run in runs}):
            launch([run for run in runs if run.layout.processes == number], steps, folder, on_cpu, limit)
    ones = {run.variant.name: run for run in runs if run.layout == ONE}
    return [(run, ones[run.variant.name]) for run in runs if run.layout != ONE]


def same_runs(pairs: Sequence[tuple[Run, Run]], file: Path) -> list[tuple[Run, Run]]:
    """Every run, those of one process included, with the same one of a file that --output wrote."""
    there = {(run.variant.name, run.layout.name): run for run in map(_run, json.loads(file.read_text()))}
    return [(run, there[run.variant.name, run.layout.name]) for run in _runs(pairs)]


def _runs(pairs: Sequence[tuple[Run, Run]]) -> list[Run]:
    return [run for run, _ in pairs] + list({reference.variant.name: reference for _, reference in pairs}.values())


def _run(content: dict[str, Any]) -> Run:
    return Run(**{**content, "variant": Variant(**content["variant"]), "layout": Layout(**content["layout"])})


def compare_devices(steps: int) -> list[tuple[Run, Run]]:
    """One GPU, with Transformer Engine and without, each beside the CPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material.save_models(folder, set(DEVICE_MODELS))
        tiny.write_rows(folder / "rows", material.rows(*material.SHORT_ROWS), material.SHORT_ROWS[0], material.JOINED)
        on_cpu = [Run(Variant(f"CPU, {model}", 1e-4, model=model), ONE) for model in DEVICE_MODELS]
        launch(on_cpu, steps, folder, on_cpu=True)
        pairs = []
        for engine in (False, True):
            for reference in on_cpu:
                name = f"GPU {'with' if engine else 'without'} TE, {reference.variant.model}"
                pairs.append((Run(replace(reference.variant, name=name, engine=engine), ONE), reference))
        launch([run for run, _ in pairs], steps, folder, on_cpu=False)
    return pairs


def available_layouts(on_cpu: bool) -> list[Layout]:
    """Those for which this machine has the GPUs; on the CPU all."""
    import torch

    return [one for one in TWO + FOUR if on_cpu or one.processes <= torch.cuda.device_count()]


def report(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    """Print a line a run; returns the names of those that differ by more than their variant's tolerance."""
    wrong = []
    print(f"{'variant':<28} {'layout':<18} {'first loss':>10} {'last':>10} {'difference':>11} {'of norms':>9}  tolerance")
    for run, reference in pairs:
        difference, norms = run.difference(reference), run.norm_difference(reference)
        agrees = difference <= run.variant.tolerance
        undecided = run.undecided(reference)
        tie = "" if undecided is None else f"  up to step {undecided}: experts chosen by rounding"
        if not agrees:
            wrong.append(f"{run.variant.name}, {run.layout.name}")
        print(
            f"{run.variant.name:<28} {run.layout.name:<18} {run.losses[0]:>10.6f} {run.losses[-1]:>10.6f} "
            f"{difference:>11.1e} {norms:>9.1e}  {run.variant.tolerance:.0e}{tie if agrees else '  DIFFERS'}",
            flush=True,
        )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("cpu", "gpu", "device"), default="cpu")
    parser.add_argument("--only", nargs="*", help="layouts to take, by name")
    parser.add_argument("--variants", nargs="*", help="variants to take, by name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for one launch")
    parser.add_argument("--output", type=Path, help="file to write the losses to")
    parser.add_argument("--against", type=Path, help="file that another version's --output wrote")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        work(arguments.task)
        return
    started = time.monotonic()
    if arguments.set == "device":
        pairs = compare_devices(arguments.steps)
    else:
        on_cpu = arguments.set == "cpu"
        layouts = available_layouts(on_cpu)
        layouts = [one for one in layouts if not arguments.only or one.name in arguments.only]
        variants = ON_CPU if on_cpu else ON_GPU
        variants = [one for one in variants if not arguments.variants or one.name in arguments.variants]
        pairs = compare(variants, layouts, arguments.steps, on_cpu, arguments.limit)
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(run) for run in _runs(pairs)]))
    wrong = report(pairs)
    if arguments.against:
        print(f"beside {arguments.against}")
        wrong += report(same_runs(pairs, arguments.against))
    print(f"{len(pairs)} runs of {arguments.steps} steps in {time.monotonic() - started:.0f} s, {len(wrong)} differ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
