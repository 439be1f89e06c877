"""Losses of fine-tuning in fp8 beside bf16, step by step, in every layout of two GPUs. Status 1 if they are far apart.

python -m tests.campaigns.fp8_losses [--model dense|mixture] [--steps 100] [--recipes tensorwise,delayed,blockwise]
    [--layouts DP2,TP2,PP2,CP2; EP2 too for a mixture]

A model of eight layers, of a mixture 16 experts each, first learns the quickstart's task in bf16, so that the runs that are
compared start where a pretrained model does. `--cpu` compares bf16 with fp32 over gloo on a smaller one, to try the program
itself.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import tiny

LIMIT_SECONDS = 900
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
OF_DENSE, OF_MIXTURE = "DP2,TP2,PP2,CP2", "EP2,DP2,TP2,PP2,CP2"
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


def train(folder: Path, name: str, start: Path, processes: int, on_cpu: bool, *options: object) -> list[float]:
    """The loss of every step."""
    arguments = ["--load", start, "--save", folder / name, "--data-path", folder / "rows", "--seq-length", ROW]
    arguments += ["--global-batch-size", 8, "--micro-batch-size", 2, "--save-interval", 1000, *options]
    run = tiny.run if on_cpu else tiny.run_on_gpu
    run(processes, "megatron.sft.train", *arguments, seconds=LIMIT_SECONDS)
    return tiny.losses(folder / name)


def compare(arguments: argparse.Namespace, folder: Path) -> bool:
    """Print a line a run; whether all are within the tolerance."""
    sizes = ON_CPU if arguments.cpu else ON_GPU
    words = {f"fp8 {recipe}": ["--precision", "fp8", "--fp8-recipe", recipe] for recipe in arguments.recipes.split(",")}
    plain, others = ("fp32", {"bf16": ["--precision", "bf16"]}) if arguments.cpu else ("bf16", words)
    prepare(folder, sizes, arguments.model == "mixture")
    before = ["--precision", plain, "--lr", 1e-3, "--train-iters", sizes[-1], "--log-interval", 1]
    learned = train(folder, "before", folder / "checkpoint", 1, arguments.cpu, *before)
    print(f"before: {learned[0]:.3f} -> {learned[-1]:.3f} in {len(learned)} steps", flush=True)
    runs = {plain: ["--precision", plain], **others}
    layouts = (arguments.layouts or (OF_MIXTURE if arguments.model == "mixture" else OF_DENSE)).split(",")
    schedule = ["--lr", 1e-4, "--min-lr", 1e-5, "--train-iters", arguments.steps, "--log-interval", 1]

    def losses_of(case: tuple[str, str]) -> list[float]:
        layout, name = case
        processes, options = LAYOUTS[layout]
        options = [*options, *schedule, *runs[name]]
        return train(folder, f"{layout} {name}", folder / "before", processes, arguments.cpu, *options)

    cases = [(layout, name) for layout in layouts for name in runs]
    good, reference = True, [0.0]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        for (layout, name), values in zip(cases, pool.map(losses_of, cases), strict=True):
            line = f"{layout:<8} {name:<15} mean loss {statistics.mean(values):.5f}, last {values[-1]:.5f}"
            if name == plain:
                reference = values
                print(line, flush=True)
                continue
            steps = [abs(a - b) / b for a, b in zip(values, reference, strict=True)]
            mean = abs(statistics.mean(values) / statistics.mean(reference) - 1)
            good = good and mean <= TOLERANCE
            apart = f"median {statistics.median(steps):.1e}, largest {max(steps):.1e}"
            print(f"{line}, relative difference of the mean {mean:.1e}, of a step: {apart}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dense", choices=("dense", "mixture"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipes", default="tensorwise,delayed,blockwise")
    parser.add_argument("--layouts", default="", help=f"default: {OF_DENSE}, of a mixture {OF_MIXTURE}")
    parser.add_argument("--at-once", type=int, default=4, help="runs side by side on the same GPUs")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return 0 if compare(arguments, Path(name)) else 1


if __name__ == "__main__":
    sys.exit(main())
