"""Works a run out piece by piece without starting it, and collects everything that would stop it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from megatron.sft.checkpoint.folder import TRACKER
from megatron.sft.data.tokenized import TokenizedRows, file_of
from megatron.sft.families.architecture import Architecture
from megatron.sft.hf.names import gigabytes
from megatron.sft.hf.published_configs import unconverted
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.planning import input_checks
from megatron.sft.planning.memory import GIB, cheapest_recompute, estimate, num_parameters
from megatron.sft.planning.memory_fit import describe_fits, gpu_memory, memory_settings
from megatron.sft.planning.options import TrainOptions
from megatron.sft.planning.run_plan import (
    architecture_of,
    check_data_fits_model,
    data_prefix,
    layout_for,
    number_problems,
    split,
    starting_point,
)
from megatron.sft.planning.run_plan import steps as count_steps
from megatron.sft.planning.run_time import full_rows, measured_rows, tokens_per_second
from megatron.sft.reporting.metrics import clock
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import Files

Result = TypeVar("Result")


Line = tuple[str, str]


# A disk reads this much in seconds.
CHECKED_BYTES = 2 << 30


@dataclass
class Planner:
    """Goes through a run's settings; `lines` grows with what follows from them, `problems` with what would stop it."""

    options: TrainOptions
    num_processes: int
    problems: list[str] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    architecture: Architecture | None = None
    layout: Layout = Layout()
    data_parallel: int = 0  # 0: the processes do not divide
    source: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    rows: TokenizedRows | None = None
    train_iters: int = 0

    def work_out(self) -> None:
        """Everything, in the order of a run's start."""
        self.problems += number_problems(self.options)
        self._model()
        self._processes()
        self._data()
        self._steps()
        self._memory()
        self._disk()
        self._time()

    def attempt(self, call: Callable[..., Result], *arguments: Any) -> Result | None:
        """The call's result, or None where it finds something wrong, which is noted."""
        try:
            return call(*arguments)
        except UserError as error:
            self.problems.append(str(error))
            return None

    def _model(self) -> None:
        options = self.options
        if not (options.save / TRACKER).exists() and not options.load.is_dir():
            found = self.attempt(unconverted, options.load)
            self.architecture, where, command = found or (None, "", "")
            self.problems.append(
                f"PRETRAIN_CHECKPOINT_PATH {options.load} does not exist: make it with scripts/2_convert.sh"
            )
            self.to_do.append(command)
            self._add("start", f"not there yet{f', sizes from {where}' if where else ''}")
        else:
            begin = self.attempt(starting_point, "", options)
            if begin:
                self.resume, start = begin
                self.source = start.manifest.get("source", {})
                self.architecture = self.attempt(architecture_of, start)
                self._add("start", f"{'resume' if self.resume else 'train'} from {start.path}")
                if self.architecture and start.manifest.get("files"):
                    files = {start.path / name: facts for name, facts in start.manifest["files"].items()}
                    self._check_sums(files, input_checks.check_checkpoint, start, self.architecture)
        if self.architecture:
            architecture = self.architecture
            self._add(
                "model",
                f"{architecture.family}, {architecture.num_layers} layers x {architecture.hidden_size}, "
                f"vocabulary {architecture.vocab_size:,}, {num_parameters(architecture) / 1e6:,.1f} M parameters",
            )

    def _processes(self) -> None:
        self.layout = layout_for(self.options, self.architecture)
        if self.architecture:
            self.attempt(check_layout, self.layout, self.architecture)
        self.data_parallel = self.attempt(self.layout.data_parallel, self.num_processes) or 0
        layout = self.layout
        self._add(
            "processes",
            f"{self.num_processes} = TP {layout.tensor_parallel} x PP {layout.pipeline_parallel} x CP "
            f"{layout.context_parallel} x DP {self.data_parallel or '?'} on {device.device_name()}",
        )

    def _data(self) -> None:
        prefix = data_prefix(self.options.data_path)
        if not file_of(prefix, "json").exists():
            self.problems.append(f"DATA_PATH {prefix} does not exist: make it with scripts/3_tokenize.sh")
            self.to_do.append(f"bash scripts/3_tokenize.sh TOKENIZER DATA {self.options.seq_length or 'LENGTH'}")
            self._add("data", "not there yet")
            return
        self.rows = self.attempt(TokenizedRows, prefix)
        if self.rows is None:
            return
        manifest = self.rows.manifest
        self._add(
            "data",
            f"{prefix}: {len(self.rows):,} rows of up to {manifest['length']:,} tokens, {manifest['conversations']:,} "
            f"conversations, {100 * manifest['trained_tokens'] / max(manifest['tokens'], 1):.1f} % of the tokens trained",
        )
        if self.architecture:
            self.attempt(check_data_fits_model, self.rows, self.options, self.architecture, self.source)
        self._check_sums(self.rows.files, input_checks.check_rows, self.rows, self.options.save)

    def _check_sums(self, files: Files, check: Callable[..., None], *arguments: Any) -> None:
        """Compare files with their manifest; where that takes minutes, leave it to the run's start and say so."""
        num_bytes = sum(facts["bytes"] for facts in files.values())
        if num_bytes <= CHECKED_BYTES:
            self.attempt(check, *arguments)
        else:
            folder = next(iter(files)).parent
            self._add("checksums", f"of {num_bytes / 1e9:.1f} GB in {folder}: compared when the run starts, not here")

    def _steps(self) -> None:
        options, num_rows = self.options, 0
        if self.rows is not None:
            parts = self.attempt(split, options, self.rows.joined)
            if parts:
                num_rows = len(parts[0])
                self._add("rows", f"{num_rows:,} for training, {len(parts[1]):,} for validation")
        if not self.data_parallel or not (num_rows or options.train_iters):
            return
        counted = self.attempt(count_steps, options, num_rows, self.data_parallel)
        if counted is None:
            return
        self.train_iters, warmup = counted
        source = "TRAIN_ITERS" if options.train_iters else f"EPOCHS={options.epochs:g}"
        epochs = f", {self.train_iters * options.global_batch_size / num_rows:.2f} epochs" if num_rows else ""
        micro_batches = options.global_batch_size // (options.micro_batch_size * self.data_parallel)
        self._add("steps", f"{self.train_iters:,} ({source}{epochs}), of them {warmup:,} of warm-up")
        self._add(
            "a step",
            f"{options.global_batch_size} rows = {micro_batches} micro-batches of {options.micro_batch_size} on each of "
            f"{self.data_parallel} copies",
        )

    def _row_length(self) -> int:
        return int(self.rows.manifest["length"]) if self.rows is not None else self.options.seq_length

    def _memory(self) -> None:
        if self.architecture is None or not self.data_parallel or not self._row_length():
            return
        settings = memory_settings(self.options, self._row_length(), self.data_parallel)
        gpu_bytes, where = gpu_memory(self.options)
        word = self.options.recompute
        if word == "auto":
            word = cheapest_recompute(
                self.architecture, self.layout, self.data_parallel, settings, gpu_bytes or 80 * GIB
            )
        each = estimate(self.architecture, self.layout, self.data_parallel, replace(settings, recompute=word))
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in each.parts().items())
        stage = f" on pipeline stage {each.stage}" if self.layout.pipeline_parallel > 1 else ""
        chosen = (
            " (chosen for 80 GB; give GPU_MEMORY_GIB)" if self.options.recompute == "auto" and not gpu_bytes else ""
        )
        self._add("memory of a GPU", f"{each.total / GIB:.1f} GiB{stage} with RECOMPUTE={word}{chosen}: {parts}")
        self._add("fits", describe_fits(self.architecture, self.layout, settings, self.options.global_batch_size))
        if gpu_bytes:
            self._add("GPU", f"{gpu_bytes / GIB:.1f} GiB, {where}")
        if gpu_bytes and not each.fits(gpu_bytes):
            self.problems.append(
                f"a GPU needs about {each.total / GIB:.1f} GiB and has {gpu_bytes / GIB:.1f} ({where}): take RECOMPUTE=auto, "
                "more GPUs, or larger TENSOR_PARALLEL_SIZE or PIPELINE_PARALLEL_SIZE (tools/plan suggests some)"
            )

    def _disk(self) -> None:
        if self.architecture is None:
            return
        folder = self.options.save
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        size = num_parameters(self.architecture) * (16 if self.options.precision == "fp32" else 14)
        kept = checkpoints_kept(self.options, self.train_iters)
        self._add(
            "disk",
            f"{gigabytes(size)} a checkpoint, {kept} kept: {gigabytes(kept * size)} of {gigabytes(free)} free",
        )
        if kept * size > free:
            self.problems.append(
                f"{kept} checkpoints of {gigabytes(size)} do not fit the {gigabytes(free)} free in {folder}: save less "
                "often (SAVE_INTERVALS), keep fewer (KEEP_LAST), make room, or set OUTPUT_PATH to another disk"
            )

    def _time(self) -> None:
        if self.architecture is None or not self.train_iters or not self._row_length():
            return
        options = self.options
        load = measured_rows(self.rows) if self.rows is not None else full_rows(self._row_length())
        speed, where = tokens_per_second(
            options.tokens_per_second, options.save, self.architecture, load, self.num_processes
        )
        tokens = self.train_iters * options.global_batch_size * load.tokens
        self._add(
            "time", f"{clock(tokens / speed)} for {tokens / 1e9:,.3f} G tokens at {speed:,.0f} tokens/s ({where})"
        )

    def _add(self, name: str, value: str) -> None:
        self.lines.append((name, value))


def checkpoints_kept(options: TrainOptions, train_iters: int) -> int:
    """Checkpoints on disk at the end of the run, and the one that is being written when an old one may go."""
    saved = -(-train_iters // options.save_interval) if train_iters else 1
    keep_last = getattr(options, "keep_last", 0)
    return min(saved, keep_last + 1) if keep_last else saved
