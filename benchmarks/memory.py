"""Measures a GPU's memory in every phase of a run, next to the estimate of `plan`: one command for a list of cases.

python -m benchmarks.memory --suite one-gpu [--seconds 420] [--output FILE]
python -m benchmarks.memory --case '--model Qwen/Qwen2.5-3B-Instruct --recompute selective --optimizer-precision bf16'

A case is options of tools/benchmark_train. Weights are random and made on the GPU, rows are random tokens; nothing is read from
disk. Every case is built, takes three steps, validates, makes what a save copies, looks for a bad row, and is built again and
filled as a resumed run is, once for each kind of state. Results are JSON lines; the table has GiB that torch allocated, and the
estimate in parentheses.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory_cases import AGAIN, SEARCH, SUITES, case_arguments, suite
from megatron.sft.planning.memory_phases import PHASES
from megatron.sft.runtime.errors import OneLineParser, UserError, run


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    cases = [*arguments.case, *(suite(arguments.suite) if arguments.suite else [])]
    cases = [f"{case} --model {arguments.model}" if arguments.model else case for case in cases]
    if not cases:
        raise UserError("nothing to measure: give --suite or --case")
    for case in cases:
        case_arguments(case)  # wrong options are said before anything is measured
    if arguments.worker:
        from benchmarks.memory_phases import measure_cases

        return measure_cases(cases, arguments.deadline)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    deadline = time.time() + arguments.seconds
    print("| case | " + " | ".join([*PHASES, SEARCH, "held", "seconds a step", "tokens/s"]) + " |")
    found = []
    for result in _measured(cases, deadline):
        found.append(result)
        print(row(result), flush=True)
        if arguments.output:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    print(worst(found))
    return 0 if all("failed" not in result for result in found) else 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="benchmarks.memory", description=__doc__)
    parser.add_argument("--suite", default="", choices=("", *SUITES))
    parser.add_argument("--case", action="append", default=[], help="options of benchmark_train; repeat it for several")
    parser.add_argument("--model", default="", help="instead of the cases' own")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case starts later than this")
    parser.add_argument("--output", type=Path, help="file to which the results are added as JSON lines")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measured(cases: list[str], deadline: float) -> Iterator[dict[str, Any]]:
    """The results of the cases, one after another. Cases of one GPU share a process as long as it holds nothing afterwards."""
    left = list(cases)
    while left:
        gpus = case_arguments(left[0]).gpus
        together = left[:1] if gpus > 1 else [case for case in left if case_arguments(case).gpus == 1]
        for result in _worker(together, gpus, deadline):
            left.remove(result["case"])
            yield result


def _worker(cases: list[str], gpus: int, deadline: float) -> Iterator[dict[str, Any]]:
    """The results of the first cases, at least one of them."""
    launch = ["megatron.sft.launch", "--standalone", "--local-addr", "localhost", "--nproc-per-node", str(gpus), "-m"]
    command = [sys.executable, "-m", *(launch if gpus > 1 else []), "benchmarks.memory", "--worker"]
    command += ["--deadline", str(deadline), *(f"--case={case}" for case in cases)]
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"case"'):
                yield json.loads(line)
                done += 1
    if done < len(cases) and (process.returncode != AGAIN or not done):
        yield {"case": cases[done], "failed": f"the process ended with status {process.returncode}; see above"}


def row(result: dict[str, Any]) -> str:
    """One case as a line of the table."""
    if "phases" not in result:
        return f"| `{result['case']}` | {result['failed']} |"
    cells = []
    for name in (*PHASES, SEARCH):
        phase = result["phases"].get(name)
        cells.append(f"{_gib(phase['peak'])} ({_gib(phase['estimate'])})" if phase else "")
    held, seconds = result.get("held"), result.get("seconds")
    cells.append("" if held is None else f"{held:.1f}")
    cells += [f"{seconds:.3f}", f"{result['tokens'] / seconds:,.0f}"] if seconds else ["", ""]
    failed = f" {result['failed']} |" if "failed" in result else ""
    return f"| `{result['case']}` | " + " | ".join(cells) + " |" + failed


def _gib(size: float) -> str:
    return f"{size:.1f}" if size >= 1 else f"{size:.2g}"


def worst(results: list[dict[str, Any]]) -> str:
    """The largest under- and over-estimate of a case's largest phase."""
    errors = []
    for result in results:
        measured = {name: phase["peak"] for name, phase in result.get("phases", {}).items()}
        if measured and "failed" not in result:
            estimate = max(phase["estimate"] for phase in result["phases"].values())
            decides = max(measured, key=measured.__getitem__)
            errors.append((estimate / measured[decides] - 1, f"{result['case']} ({decides})"))
    if not errors:
        return f"{len(results)} cases, none measured"
    lowest, highest = min(errors), max(errors)
    return (
        f"{len(errors)} of {len(results)} cases measured; lowest estimate {100 * lowest[0]:+.1f} % ({lowest[1]}), highest "
        f"{100 * highest[0]:+.1f} % ({highest[1]})"
    )


if __name__ == "__main__":
    run(main)
