"""What the damage campaign damages: a tiny model, its conversions, its data and a run, and the check that each must fail."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.support import tiny

Check = Callable[[Path, Path], str]
Script = Callable[[Path, Path], tuple[dict[str, str], list[str]]]
LORA_RANK = 2
EVERY = ("flip", "cut", "grow", "blank", "remove", "replace")


@dataclass(frozen=True)
class Case:
    """A class of inputs: a folder, the files in it that are damaged and how, and what a command says of a damaged copy.

    `check(damaged, out)` returns `error: …`, one line; `script` is the same as a command line. `others` has, for a file,
    another one that may get into its place.
    """

    name: str
    source: Path
    files: list[str]
    kinds: tuple[str, ...]
    check: Check
    others: dict[str, Path] = field(default_factory=dict)
    also_named: tuple[str, ...] = ()
    script: Script | None = None
    falls_back: bool = False

    def differs(self, name: str) -> bool:
        """Whether what may get into a file's place is another content."""
        return self.others[name].read_bytes() != (self.source / name).read_bytes()


@dataclass(frozen=True)
class Material:
    cases: list[Case]


def one_process() -> AbstractContextManager[None]:
    """A process group of this process alone, which the verification of a run's checkpoint asks."""
    from megatron.sft.runtime import device

    return device.process_group()


def make(folder: Path) -> Material:
    """Build everything below `folder`: half a minute."""
    folder.mkdir(parents=True)
    model = tiny.save_qwen2(folder / "model", tied=False)
    other_model = tiny.save_qwen2(folder / "other_model", tied=True)
    converted = folder / "converted"
    tiny.run_module("convert", "--source", model, "--output", converted)
    classic = folder / "classic"
    sizes = ("--tensor-model-parallel-size", 2)
    tiny.run_module("convert", "--source", model, "--output", classic, "--ckpt-format", "torch", *sizes)
    data = folder / "data" / "rows.v1"
    other_data = folder / "other_data" / "rows.v1"
    for prefix, seed in ((data, 0), (other_data, 1)):
        prefix.parent.mkdir()
        tiny.write_rows(prefix, tiny.random_rows(48, 128, seed), 128)
        add_groups(prefix)
    run = folder / "run"
    options = ("--precision", "fp32", "--train-iters", 4, "--save-interval", 2, "--global-batch-size", 8)
    inputs, adapters = ("--load", converted, "--data-path", data), folder / "adapters"
    tiny.run_module("train", "train", *inputs, "--save", run, *options)
    tiny.run_module("train", "train", *inputs, "--save", adapters, *options, "--lora-rank", LORA_RANK)
    made = [*run_cases(run, converted, data), *start_cases(converted, classic, data, model)]
    made += adapter_cases(adapters, converted, data)
    return Material([*made, data_case(data, other_data, converted), *model_cases(folder, model, other_model)])


def add_groups(prefix: Path) -> None:
    import numpy as np

    from megatron.sft.data.tokenized import data_file
    from megatron.sft.runtime.manifest import sealed, sha256_of_file

    manifest = json.loads(data_file(prefix, "json").read_text())
    path = data_file(prefix, "groups")
    np.arange(manifest["conversations"], dtype=np.int64).tofile(path)
    manifest["files"]["groups"] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    data_file(prefix, "json").write_text(json.dumps(sealed(manifest)))


def names_below(folder: Path) -> list[str]:
    """Files that are an input; a memory of checksums only says that one was read before."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".checked.json"))
    return sorted(str(path.relative_to(folder)) for path in files)


def plan_of(mode: str, load: Path, data: Path, save: Path, lora_rank: int = 0) -> Any:
    from megatron.sft.planning.options import TrainOptions
    from megatron.sft.planning.resolution import plan_run

    options = TrainOptions(load=load, data_path=data, save=save, train_iters=4, global_batch_size=8, precision="fp32")
    return plan_run(mode, replace(options, lora_rank=lora_rank), num_processes=1)


def train_script(mode: str, load: Path, data: Path, save: Path) -> tuple[dict[str, str], list[str]]:
    paths = {"PRETRAIN_CHECKPOINT_PATH": str(load), "DATA_PATH": str(data), "OUTPUT_PATH": str(save)}
    sizes = {"TRAIN_ITERS": "4", "GLOBAL_BATCH_SIZE": "8", "PRECISION": "fp32", "SAVE_INTERVALS": "2"}
    return {**paths, **sizes, "MICRO_BATCH_SIZE": "1"}, ["scripts/4_train.sh", mode]


def run_cases(run: Path, converted: Path, data: Path) -> list[Case]:
    from megatron.sft.checkpoint import verification
    from tests.campaigns.damage_campaign import quietly

    def resumed(folder: Path, expected: int) -> str:
        def check() -> None:
            plan = plan_of("resume", converted, data, folder)
            taken = verification.checked_run(plan.start)
            if taken.iteration != expected:
                raise RuntimeError(f"iteration {taken.iteration} was taken, not {expected}")

        return quietly(check)

    newest, older = run / "iter_0000004", run / "iter_0000002"
    names = [f"iter_0000004/{name}" for name in names_below(newest)]
    others = {name: older / Path(name).name for name in names}
    tracker = "latest_checkpointed_iteration.txt"
    (run.parent / "other_tracker").write_text("2")
    return [
        Case(
            "newest checkpoint of a run: the one before is taken", run, names, (*EVERY, "add"),
            lambda folder, out: resumed(folder, 2), others, ("iter_0000004/__",),
            lambda folder, out: train_script("resume", converted, data, folder), falls_back=True,
        ),
        Case(
            "tracker of a run: the newest checkpoint is taken", run, [tracker], ("flip", "cut", "remove", "replace"),
            lambda folder, out: resumed(folder, 4), {tracker: run.parent / "other_tracker"},
        ),
    ]  # fmt: skip


def adapter_cases(run: Path, converted: Path, data: Path) -> list[Case]:
    """A checkpoint of adapters, and the weights under them, which every resumed run reads again."""
    from megatron.sft.checkpoint import verification
    from megatron.sft.planning import input_checks
    from tests.campaigns.damage_campaign import quietly

    def resumed(folder: Path, out: Path) -> str:
        def check() -> None:
            taken = verification.checked_run(plan_of("resume", converted, data, folder, LORA_RANK).start)
            if taken.iteration != 2:
                raise RuntimeError(f"iteration {taken.iteration} was taken, not 2")

        return quietly(check)

    def on_base(folder: Path, out: Path) -> str:
        return quietly(lambda: input_checks.check(plan_of("resume", folder, data, run, LORA_RANK)))

    names = [f"iter_0000004/{name}" for name in names_below(run / "iter_0000004")]
    others = {name: run / "iter_0000002" / Path(name).name for name in names}
    base = [f"iter_0000001/{file}" for file in names_below(converted / "iter_0000001")]
    swapped = {file: converted / base[(number + 1) % len(base)] for number, file in enumerate(base)}
    named = ("iter_0000001 ", "latest_checkpointed_iteration.txt", "manifest.json")
    return [
        Case(
            "newest checkpoint of adapters: the one before is taken", run, names, (*EVERY, "add"),
            resumed, others, ("iter_0000004/__",), falls_back=True,
        ),
        Case("weights under adapters, resuming", converted, base, EVERY, on_base, swapped, named),
    ]  # fmt: skip


def start_cases(converted: Path, classic: Path, data: Path, model: Path) -> list[Case]:
    from megatron.sft import export
    from megatron.sft.planning import input_checks
    from tests.campaigns.damage_campaign import quietly

    def started(folder: Path, out: Path) -> str:
        return quietly(lambda: input_checks.check(plan_of("train", folder, data, out)))

    def exported(folder: Path, out: Path) -> str:
        return quietly(lambda: call(export.main, "--load", folder, "--hf-dir", model, "--output", out))

    cases = []
    for name, root in (("torch_dist", converted), ("torch", classic)):
        files = [f"iter_0000001/{file}" for file in names_below(root / "iter_0000001")]
        others = {file: root / files[(number + 1) % len(files)] for number, file in enumerate(files)}
        # Without .metadata or mp_rank_*, or without its tracker, it is the folder that is named.
        named = ("iter_0000001 ", "latest_checkpointed_iteration.txt", "manifest.json")
        cases += [
            Case(f"converted checkpoint ({name}), training", root, files, EVERY, started, others, named,
                 lambda folder, out: train_script("train", folder, data, out)),
            Case(f"converted checkpoint ({name}), export", root, files, EVERY, exported, others, named,
                 lambda folder, out: ({}, ["scripts/5_export.sh", str(folder), str(model), str(out)])),
            Case(f"tracker of a conversion ({name})", root, ["latest_checkpointed_iteration.txt"], ("flip", "cut", "remove"),
                 started, {}, (root.name, "damaged has no checkpoint", "damaged has no latest")),
        ]  # fmt: skip
    return cases


def data_case(data: Path, other: Path, converted: Path) -> Case:
    from megatron.sft.planning import input_checks
    from tests.campaigns.damage_campaign import quietly

    def check(folder: Path, out: Path) -> str:
        return quietly(lambda: input_checks.check(plan_of("train", converted, folder / data.name, out)))

    names = names_below(data.parent)
    others = {name: other.parent / name for name in names}
    return Case(
        "tokenised data (.bin, .idx, .groups, .json)", data.parent, names, EVERY, check, others, (f"{data.name}.",),
        lambda folder, out: train_script("train", converted, folder / data.name, out),
    )  # fmt: skip


def model_cases(folder: Path, model: Path, other: Path) -> list[Case]:
    from megatron.sft import convert
    from megatron.sft.hf.download_record import RECORD, download_facts
    from tests.campaigns.damage_campaign import quietly

    def converts(damaged: Path, out: Path) -> str:
        return quietly(lambda: call(convert.main, "--source", damaged, "--output", out))

    sharded = folder / "sharded"
    shutil.copytree(model, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False).save_pretrained(sharded, max_shard_size="200KB")
    downloaded = folder / "downloaded"
    shutil.copytree(sharded, downloaded)
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    sums = {name: hashlib.sha256((sharded / name).read_bytes()).hexdigest() for name in shards}
    sizes = {name: (sharded / name).stat().st_size for name in shards}
    (downloaded / RECORD).write_text(json.dumps({"checksums": download_facts(sizes, sums)}))
    swapped = {name: sharded / shards[(number + 1) % len(shards)] for number, name in enumerate(shards)}
    swapped["config.json"] = other / "config.json"
    index = "model.safetensors.index.json"
    named = ("model-0000", index, "config.json")

    def script(damaged: Path, out: Path) -> tuple[dict[str, str], list[str]]:
        return {"VERIFY": "0"}, ["scripts/2_convert.sh", str(damaged), "1", "1", str(out)]

    return [
        Case("shards of a downloaded model", downloaded, shards, EVERY, converts, swapped, named, script),
        Case("shards of a model without checksums: structure", sharded, shards, ("cut", "grow", "remove", "replace"),
             converts, swapped, named, script),
        Case("index and configuration of a model: structure", sharded, [index, "config.json"], ("cut", "remove"),
             converts, swapped, (*named, "sharded", "damaged")),
        Case("configuration of another model", sharded, ["config.json"], ("replace",), converts, swapped, ("damaged", *named)),
    ]  # fmt: skip


def call(entry: Callable[[list[str]], int], *arguments: object) -> None:
    environment = dict(os.environ)
    try:
        entry([*map(str, arguments)])
    finally:
        os.environ.clear()
        os.environ.update(environment)
