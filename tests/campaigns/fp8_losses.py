"""Losses of fine-tuning in fp8 beside bf16, step by step, in every layout of two GPUs. Status 1 if they are far apart.

python -m tests.campaigns.fp8_losses [--model dense|mixture] [--steps 100] [--recipes tensorwise,delayed,blockwise]
    [--layouts "one GPU,DP2,TP2,PP2,CP2"; EP2 too for a mixture]

A model of eight layers, of a mixture 16 experts each, first learns the quickstart's task in bf16, so that the runs that are
compared start where a pretrained model does. `--cpu` compares bf16 with fp32 over gloo on a smaller one, to try the program
itself.
"""

import argparse
import faulthandler
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.campaigns.parallel_losses import leave_groups
from tests.support import tiny

LIMIT_SECONDS = 900  # of a layout
GLOBAL_BATCH = 8
TOLERANCE = 1e-2  # of the mean loss of all steps, relative
ROW = 512
LAYOUTS = {
    "one GPU": (1, []),
    "DP2": (2, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel", "1"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "CP2": (2, ["--context-parallel-size", "2"]),
    "EP2": (2, ["--expert-model-parallel-size", "2"]),
}
OF_DENSE, OF_MIXTURE = "one GPU,DP2,TP2,PP2,CP2", "one GPU,EP2,DP2,TP2,PP2,CP2"
# Hidden size, MLP, heads, groups, layers; steps before, after which there is something left to learn.
ON_GPU, ON_CPU = (1024, 2816, 16, 4, 8, 100), (64, 192, 4, 2, 2, 40)


def prepare(folder: Path, sizes: tuple[int, ...], mixture: bool) -> None:
    """`model`, `checkpoint` and `rows`."""
    import transformers

    tiny.run_module("quickstart", "model", folder / "quickstart")
    config = transformers.AutoConfig.from_pretrained(folder / "quickstart")
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = sizes[:4]
    config.num_hidden_layers, config.max_position_embeddings = sizes[4], 2048
    config.layer_types, config.head_dim = None, sizes[0] // sizes[2]
    fields = {name: value for name, value in config.to_dict().items() if name not in ("layer_types", "model_type")}
    kind = type(config)
    if mixture:
        kind = transformers.Qwen3MoeConfig
        fields |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": sizes[0] // 2, "norm_topk_prob": True}
    config = kind.from_dict({**fields, "architectures": None})
    shutil.copytree(folder / "quickstart", folder / "model")
    for path in (folder / "model").glob("*.safetensors*"):
        path.unlink()
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    tiny.run_module("convert", "--source", folder / "model", "--output", folder / "checkpoint")
    data = tiny.ROOT / "assets" / "quickstart" / "train.json"
    arguments = ["--tokenizer", folder / "model", "--seq-length", ROW, "--input", data]
    tiny.run_module("tokenize", *arguments, "--output-prefix", folder / "rows")


def train(options: Sequence[str], num_processes: int) -> list[float]:
    """The loss of every step, in each process."""
    from megatron.sft.model import process_groups
    from megatron.sft.planning.options import parse
    from megatron.sft.planning.resolution import plan_run
    from megatron.sft.training import state
    from megatron.sft.training.engine import Engine
    from megatron.sft.training.feeder import Feeder

    mode, parsed = parse(["train", *options])
    plan = plan_run(mode, parsed, num_processes)
    with process_groups.model_parallel(plan.layout):
        engine = Engine(plan)
        state.load_start(engine)
        feeder = Feeder(plan)
        steps = range(0, plan.train_iters * GLOBAL_BATCH, GLOBAL_BATCH)
        return [engine.train_step(feeder.training(step)).loss.reduce()[0] for step in steps]


def work(task: Path) -> None:
    """In each process of a layout: the task's runs one after another, whose losses go into files."""
    import torch

    from megatron.sft.runtime import device, ranks

    content = json.loads(task.read_text())
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    with device.process_group(timeout_minutes=5):
        for name, options in content["runs"].items():
            losses = train(options, content["processes"])
            if ranks.is_rank_0():
                task.with_name(f"{task.stem} {name}.json").write_text(json.dumps(losses))
            leave_groups()
            if torch.cuda.is_available():
                from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

                FP8GlobalStateManager.reset()  # a run's scales would be updated with the next one's


def start(folder: Path, name: str, processes: int, on_cpu: bool, runs: Mapping[str, Sequence[object]]) -> list[list[float]]:
    """The losses of these runs, which follow one another in the same processes."""
    task = folder / f"{name}.json"
    given = {run: [*_data(folder), "--save", folder / f"{name} {run}", *options] for run, options in runs.items()}
    listed = {run: list(map(str, options)) for run, options in given.items()}
    task.write_text(json.dumps({"processes": processes, "runs": listed}))
    run = tiny.run if on_cpu else tiny.run_on_gpu
    run(processes, "tests.campaigns.fp8_losses", "--task", task, seconds=LIMIT_SECONDS + 60)
    return [json.loads(task.with_name(f"{name} {run}.json").read_text()) for run in runs]


def _data(folder: Path) -> list[object]:
    return ["--data-path", folder / "rows", "--seq-length", ROW, "--global-batch-size", GLOBAL_BATCH, "--micro-batch-size", 2]


def learn(folder: Path, plain: str, steps: int, on_cpu: bool) -> None:
    """`before`, a run's folder."""
    options = [
        "--load",
        folder / "checkpoint",
        "--save",
        folder / "before",
        "--data-path",
        folder / "rows",
        "--seq-length",
        ROW,
    ]
    options += ["--global-batch-size", GLOBAL_BATCH, "--micro-batch-size", 2, "--save-interval", steps, "--lr", 1e-3]
    run = tiny.run if on_cpu else tiny.run_on_gpu
    run(1, "megatron.sft.train", *options, "--train-iters", steps, "--precision", plain, "--log-interval", 1)
    losses = tiny.losses(folder / "before")
    print(f"before: {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps", flush=True)


def compare(arguments: argparse.Namespace, folder: Path) -> bool:
    """Print a line a run; whether all are within the tolerance."""
    sizes = ON_CPU if arguments.cpu else ON_GPU
    words = {f"fp8 {recipe}": ["--precision", "fp8", "--fp8-recipe", recipe] for recipe in arguments.recipes.split(",")}
    plain, others = ("fp32", {"bf16": ["--precision", "bf16"]}) if arguments.cpu else ("bf16", words)
    prepare(folder, sizes, arguments.model == "mixture")
    learn(folder, plain, sizes[-1], arguments.cpu)
    schedule = ["--load", folder / "before", "--lr", 1e-4, "--min-lr", 1e-5, "--train-iters", arguments.steps]
    runs = {plain: ["--precision", plain], **others}
    layouts = (arguments.layouts or (OF_MIXTURE if arguments.model == "mixture" else OF_DENSE)).split(",")

    def losses_of(layout: str) -> list[list[float]]:
        processes, options = LAYOUTS[layout]
        given = {name: [*schedule, *options, *run] for name, run in runs.items()}
        return start(folder, layout, processes, arguments.cpu, given)

    good = True
    with ThreadPoolExecutor(arguments.at_once) as pool:
        for layout, (reference, *compared) in zip(layouts, pool.map(losses_of, layouts), strict=True):
            print(f"{layout:<8} {plain:<15} {_losses(reference)}", flush=True)
            for name, values in zip(others, compared, strict=True):
                steps = [abs(a - b) / b for a, b in zip(values, reference, strict=True)]
                mean = abs(statistics.mean(values) / statistics.mean(reference) - 1)
                good = good and mean <= TOLERANCE
                apart = f"median {statistics.median(steps):.1e}, largest {max(steps):.1e}"
                line = f"{layout:<8} {name:<15} {_losses(values)}, relative difference of the mean {mean:.1e}"
                print(f"{line}, of a step: {apart}", flush=True)
    return good


def _losses(values: list[float]) -> str:
    return f"mean loss {statistics.mean(values):.5f}, last {values[-1]:.5f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dense", choices=("dense", "mixture"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipes", default="tensorwise,delayed,blockwise")
    parser.add_argument("--layouts", default="", help=f"default: {OF_DENSE}, of a mixture {OF_MIXTURE}")
    parser.add_argument("--at-once", type=int, default=4, help="layouts side by side on the same GPUs")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        work(arguments.task)
        return 0
    with tempfile.TemporaryDirectory() as name:
        return 0 if compare(arguments, Path(name)) else 1


if __name__ == "__main__":
    sys.exit(main())
