"""Every family's tiny model on a GPU next to the CPU: logits and gradients of a packed row; status 1 if any is too far off.

python -m tests.campaigns.families_on_gpu [--folder FOLDER] [FAMILY ...]

FOLDER keeps the models and what the CPU computed, which a later call with it does not repeat: make it where no GPU waits.
The reference is transformers' in float32 on the CPU. In float32 ours may differ by 1e-4 of a tensor's norm; in bfloat16 by what
bfloat16 costs the same model on the CPU, and half as much again plus 1e-2. Without a GPU the CPU is compared with itself.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny, tiny_families

Found = dict[str, torch.Tensor]
EXACT, NEAR, SHARE = 1e-4, 1e-2, 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(tiny_families.FAMILIES))
    parser.add_argument("--worker", default="", choices=("", "reference", "cpu", "gpu"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keeps models and references")
    arguments = parser.parse_args()
    if arguments.worker:
        compute(arguments.worker, arguments.folder, arguments.families)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        for family in arguments.families:
            if not (folder / family / "mcore").exists():
                model = tiny_families.save_family(folder / family / "hf", family)
                tiny.run_module("convert", "--source", model, "--output", folder / family / "mcore", "--verify", "0")
        for worker in ("reference", "cpu", "gpu"):
            families = [name for name in arguments.families if worker == "gpu" or not (folder / name / f"{worker}.pt").exists()]
            environment = {**os.environ, **({} if worker == "gpu" else {"MEGATRON_SFT_DEVICE": "cpu"})}
            command = [sys.executable, "-m", "tests.campaigns.families_on_gpu", "--worker", worker, "--folder", str(folder)]
            if families:
                subprocess.run([*command, *families], env=environment, check=True)
        failed = [family for family in arguments.families if not report(folder / family, family)]
    print(f"too far off: {', '.join(failed)}" if failed else f"{len(arguments.families)} families: none is too far off")
    return 1 if failed else 0


def report(folder: Path, family: str) -> bool:
    """Print a family's line; whether all is near enough."""
    expected: Found = torch.load(folder / "reference.pt")
    cpu, gpu = (torch.load(folder / f"{device}.pt") for device in ("cpu", "gpu"))
    good, texts = True, []
    gradients = [name for name in expected if name != "logits"]
    for precision, limit in (("fp32", EXACT), ("bf16", NEAR)):
        for what, names in (("logits", ["logits"]), ("gradients", gradients)):
            # In 16 bits a token may go to another expert, whose gradient is then another: all gradients as one vector.
            apart = [[name] for name in names] if precision == "fp32" else [names]
            base = max(distance(cpu[precision], expected, group) for group in apart)
            ours, worst = max((distance(gpu[precision], expected, group), group[0]) for group in apart)
            allowed = limit if precision == "fp32" else SHARE * base + limit
            good &= ours <= allowed
            texts.append(f"{precision} {what} {ours:.1e} (CPU {base:.1e}{', ' + worst if ours > allowed else ''})")
    print(f"{family:24} {'; '.join(texts)}", flush=True)
    return good


def distance(found: Found, expected: Found, names: list[str]) -> float:
    """Relative, of these tensors as one vector."""
    squares = [(float((found[n].float() - expected[n]).square().sum()), float(expected[n].square().sum())) for n in names]
    return float((sum(off for off, _ in squares) / max(sum(size for _, size in squares), 1e-12)) ** 0.5)


def compute(worker: str, folder: Path, families: list[str]) -> None:
    if worker == "reference":
        sys.modules["fla"] = None  # type: ignore[assignment]  # transformers would take its kernels on the CPU too

    from megatron.sft.compare_logits import transformers_logits
    from megatron.sft.hf.folder import HFFolder
    from megatron.sft.model import process_groups
    from megatron.sft.model.layout import Layout
    from tests.support.conversion_worker import conversations, packed_row, transformers_gradients

    if worker == "reference":
        for family in families:
            source = HFFolder(folder / family / "hf")
            logits = transformers_logits(source, conversations(source))
            found = transformers_gradients(source, packed_row(source))
            torch.save({"logits": logits, **found}, folder / family / "reference.pt")
        return
    with process_groups.parallel(Layout()):
        for family in families:
            results = {precision: of_precision(folder / family, precision) for precision in ("fp32", "bf16")}
            torch.save(results, folder / family / f"{worker}.pt")


def of_precision(folder: Path, precision: str) -> Found:
    """Our logits, and gradients by the names of the reference's tensors."""
    from megatron.sft.checkpoint.folder import open_checkpoint
    from megatron.sft.checkpoint.model_shards import load_weights
    from megatron.sft.hf.folder import HFFolder
    from megatron.sft.model.config import transformer_config
    from megatron.sft.model.gpt import build_model
    from megatron.sft.model.layout import Layout
    from megatron.sft.runtime import device
    from megatron.sft.training.batches import make_micro_batch
    from tests.support.conversion_worker import packed_row

    source, layout = HFFolder(folder / "hf"), Layout()
    model = build_model(source.architecture, layout, transformer_config(source.architecture, layout, precision))
    load_weights(open_checkpoint(folder / "mcore"), [model], layout)
    row = packed_row(source)
    batch = make_micro_batch([row], 1, "token", device.current())
    for parameter in model.parameters():
        # Where linear layers add their weights' gradients themselves, as in training.
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    with torch.no_grad():
        logits = model.eval()(batch=batch, logits=True)[: len(row.tokens)].float().cpu()
    summed, *_ = model.train()(batch=batch)
    summed.backward()
    return {"logits": logits, **dict(gradients_of(model, source, int(row.trained.sum())))}


def gradients_of(model: torch.nn.Module, source: Any, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    """By the names of files, of the mean over `count` tokens."""
    from megatron.sft.model.layout import Layout
    from megatron.sft.model.live_weights import live_weights

    for weight in live_weights(model, source.architecture, Layout()):
        if weight.entry.is_buffer:
            continue
        parameter: Any = weight.parameter
        gradient = parameter.main_grad
        if parameter.grad is not None and not parameter.grad_added_to_main_grad:
            gradient = gradient + parameter.grad.float()
        if gradient.shape != weight.values.shape:  # of several experts
            gradient = gradient[(weight.values.data_ptr() - parameter.data_ptr()) // weight.values.nbytes]
        if "embedding" in weight.entry.megatron or "output_layer" in weight.entry.megatron:
            gradient = gradient[: source.architecture.vocab_size]
        parts = weight.entry.rule.to_hf(source.architecture, gradient)
        yield from zip(weight.entry.hf, (part.cpu() / count for part in parts), strict=True)


if __name__ == "__main__":
    sys.exit(main())
