"""Fixtures: tiny models made with transformers, tiny data, and real processes."""

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from megatron.sft.runtime import device
from tests.support import tiny

# A shell that starts the tests in the background has them ignore SIGINT, nohup SIGHUP, and so would the runs that are sent one.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, lambda *_: None)
# Transformer Engine would have float32 products of this process in TensorFloat-32, as runs never have them.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
# The same examples in every run, however busy the machine. Others are searched with --hypothesis-profile=default.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("the same in every run", derandomize=True, deadline=None)
    settings.load_profile("the same in every run")


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    """The same random numbers and environment variables, whichever tests this process ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random Qwen2: untied, QKV biases, 3 layers, 2 KV heads, a vocabulary of 131 (odd)."""
    return tiny.save_qwen2(tmp_path_factory.mktemp("models") / "tiny_qwen2", tied=False)


@pytest.fixture(scope="session")
def tiny_qwen2_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with tied embeddings."""
    return tiny.save_qwen2(tmp_path_factory.mktemp("models") / "tiny_qwen2_tied", tied=True)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16: no biases, 5 layers, an explicit head_dim."""
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "tiny_llama")


@pytest.fixture(scope="session")
def converted(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_qwen2` as a torch_dist checkpoint."""
    output = tmp_path_factory.mktemp("converted") / "tiny_qwen2_Megatron_TP1PP1"
    tiny.run_module("convert", "--hf-dir", tiny_qwen2, "--output", output)
    return output


@pytest.fixture(scope="session")
def packed_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of tokenised data: 64 packed rows of up to 128 tokens."""
    prefix = tmp_path_factory.mktemp("data") / "packed.v1"
    return tiny.write_rows(prefix, tiny.random_rows(64, 128), length=128)


@pytest.fixture(scope="session")
def train(converted: Path, packed_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train the tiny model; returns the run's folder. `train(processes, *options, mode="train", save=None)`."""

    def start(
        processes: int, *options: object, mode: str = "train", save: Path | None = None, data: Path | None = None
    ) -> Path:
        folder = save or tmp_path_factory.mktemp("runs") / "run"
        tiny.launch(
            processes,
            "train",
            mode,
            *("--load", converted, "--data-path", data or packed_rows, "--save", folder),
            *("--precision", "fp32", "--lr", "1e-3", "--min-lr", "1e-4", "--train-iters", "10"),
            *("--global-batch-size", "8", "--micro-batch-size", "2"),
            *options,
        )
        return folder

    return start


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that every payload creates; and nothing else may appear beside the files of the test."""
    path = tmp_path / "it ran"
    yield path
    assert not path.exists(), "a file was executed"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """`-m gpu` runs on machines that have only what training needs: a file that needs another package is skipped there.

    Everywhere else a package that is missing is an error, so that nothing is skipped by mistake.
    """
    report = yield
    if report.outcome == "failed" and collector.config.option.markexpr == "gpu":
        missing = re.search(r"ModuleNotFoundError: No module named '([^']+)'", str(report.longrepr))
        if missing and missing[1].partition(".")[0] not in ("megatron", "tests"):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


# What takes longest, by --durations, in the order in which it is started; then the unit tests, before tests that use
# megatron-core in the same process; then the rest.
LONGEST = (
    *("test_slurm", "test_faults", "test_smollm2", "test_families", "test_quickstart", "test_parallel_losses", "test_adapters"),
    *("test_environments", "test_both_cores", "test_console", "test_odd_paths", "test_first_hour", "test_frozen_parts"),
    *("test_readme", "test_launch", "test_adapter_settings", "test_steering"),
    *("test_plan", "test_mixtures", "test_pair_runs", "test_training"),
)


def _start_order(item: pytest.Item) -> tuple[int, bool]:
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST), "unit" not in item.path.parts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; tests of a GPU are skipped where there is none."""
    items.sort(key=_start_order)
    if device.has_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
