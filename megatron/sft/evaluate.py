"""Scores of one model or several: `bash scripts/7_evaluate.sh HF_DIR... TASKS`, which runs

python -m megatron.sft.evaluate BEFORE AFTER heldout.json,gsm8k --control "<short>" --control "<think>"
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.inference.chat_model import (
    BACKENDS,
    DTYPES,
    ChatModel,
    check_control,
    check_model_folder,
    load_chat_model,
)
from megatron.sft.inference.decoding import Decoding
from megatron.sft.inference.exact_match import exact_match
from megatron.sft.inference.lm_eval_tasks import Benchmarks, BenchmarkSettings, check_tasks
from megatron.sft.inference.scores import Score, draw, markdown, rows_of
from megatron.sft.inference.serving import serve_hint
from megatron.sft.reporting.curves import run_names
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import sha256_of_file, sha256_of_text, write_json, write_text

RESULTS = Path("outputs/evaluations")


@dataclass
class Evaluation:
    """One model and how it is asked; it is loaded where a score is missing."""

    folder: Path
    name: str
    controls: list[str]
    decoding: Decoding
    settings: BenchmarkSettings
    limit: int | None
    _chat_model: ChatModel | None = field(default=None, repr=False)
    _benchmarks: dict[str, Benchmarks] = field(default_factory=dict, repr=False)

    def result(self, task: str, output: Path) -> dict[str, Any]:
        """The result of one task, from `output` if it is there for the same model, data and settings."""
        fingerprint = self._fingerprint(task)
        if (kept := _kept(output, fingerprint)) is not None:
            print(f"{self.name}, {task}: kept from before in {output}")
            return kept
        print(f"{self.name}, {task}:", flush=True)
        started = time.monotonic()
        result = self._asked(Path(task)) if Path(task).is_file() else self._run(task)
        seconds = round(time.monotonic() - started, 1)
        result = {"model": str(self.folder), "fingerprint": fingerprint, "seconds": seconds, **result}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result)
        print(f"in {seconds:.0f} s, all of it in {output}")
        return result

    def _asked(self, data: Path) -> dict[str, Any]:
        if self._chat_model is None:
            settings = self.settings
            self._chat_model = load_chat_model(
                self.folder, settings.dtype, settings.backend, settings.seed, settings.num_gpus
            )
        return exact_match(self._chat_model, data, self.controls, self.decoding, self.limit)

    def _run(self, task: str) -> dict[str, Any]:
        parts = []
        for control in self.controls:
            benchmarks = self._benchmarks.setdefault(control, Benchmarks(self.folder, self.settings, control))
            parts.append(benchmarks.run(task))
        scores = [score for part in parts for score in part["scores"]]
        return {"task": task, "modes": dict(zip(self.controls, parts, strict=True)), "scores": scores}

    def _fingerprint(self, task: str) -> str:
        """Of all that decides the scores. The model's files are told by size and time: a hash would read all weights."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
        model = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        data = sha256_of_file(Path(task)) if Path(task).is_file() else task
        decoding = {**asdict(self.decoding), "batch_size": 0}
        settings = {**asdict(self.settings), "batch_size": 0, "num_gpus": 0}
        facts = [str(self.folder.resolve()), model, data, self.controls, decoding, settings, self.limit]
        return sha256_of_text(json.dumps(facts))


def _kept(output: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("fingerprint") == fingerprint else None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    *texts, last = arguments.models_and_tasks
    names, models = named_models(texts)
    # A file may have a comma in its path.
    tasks = [last] if Path(last).is_file() else [task for task in last.split(",") if task]
    controls = list(dict.fromkeys(arguments.control or [""]))
    _check(arguments, models, tasks, controls)
    results = []
    for model, name in zip(models, names, strict=True):
        evaluation = _evaluation(arguments, model, name, controls)
        results.append([evaluation.result(task, _output(arguments, name, task)) for task in tasks])
    if len(models) > 1 or len(tasks) > 1:
        _write_table(names, results, arguments.table or RESULTS / "scores")
        print(f"serve it: {serve_hint(models[-1])}")
    return 0


def named_models(texts: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Names and folders of the models, each given as FOLDER or as NAME=FOLDER."""
    given = [text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text) for text in texts]
    folders = [Path(folder) for _, _, folder in given]
    names = [name or default for (name, _, _), default in zip(given, run_names(folders), strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"models {', '.join(names)} are not told apart: name them, such as before={folders[0]}")
    return names, folders


def _evaluation(arguments: argparse.Namespace, model: Path, name: str, controls: list[str]) -> Evaluation:
    settings = BenchmarkSettings(
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens or 0,
        chat_template=not arguments.no_chat_template,
        dtype=arguments.dtype,
        backend=arguments.backend,
        num_gpus=arguments.num_gpus,
        include=arguments.include,
        **({"batch_size": arguments.batch_size} if arguments.batch_size else {}),
    )
    decoding = Decoding(
        arguments.max_new_tokens or Decoding.max_new_tokens, 0.0, arguments.batch_size or Decoding.batch_size
    )
    return Evaluation(model, name, controls, decoding, settings, arguments.limit)


def _output(arguments: argparse.Namespace, name: str, task: str) -> Path:
    given: Path | None = arguments.output
    return given or RESULTS / f"{name}-{Path(task).stem if Path(task).is_file() else task}.json".replace("/", "-")


def _check(arguments: argparse.Namespace, models: Sequence[Path], tasks: Sequence[str], controls: list[str]) -> None:
    """Everything that can be found wrong before a model is loaded."""
    for model in models:
        check_model_folder(model)
        if any(controls):
            tokenizer = load_tokenizer(model)
            for control in controls:
                check_control(tokenizer, control)
    for name in ("limit", "max_new_tokens", "batch_size", "num_gpus"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{name.upper()}={value} is too small: give at least 1")
    if not tasks:
        raise UserError("no task is named: give data files or benchmarks with commas between, such as gsm8k,mmlu")
    if arguments.output and (len(models) > 1 or len(tasks) > 1):
        raise UserError(f"OUTPUT={arguments.output} is for one model and one task: for several set TABLE")
    names = [task for task in tasks if not Path(task).is_file()]
    for task in names:
        if task.endswith((".json", ".jsonl", ".csv", ".parquet")) or "/" in task:
            raise UserError(f"data file {task} does not exist: check the path")
    if names:
        check_tasks(names, arguments.include)


def _write_table(names: Sequence[str], results: Sequence[Sequence[dict[str, Any]]], table: Path) -> None:
    scores = [[Score(**score) for result in of_model for score in result["scores"]] for of_model in results]
    rows = rows_of(scores)
    text = markdown(names, rows)
    base = table.with_suffix("") if table.suffix in (".md", ".png") else table
    base.parent.mkdir(parents=True, exist_ok=True)
    files = [base.with_name(f"{base.name}.{ending}") for ending in ("md", "png")]
    write_text(files[0], text)
    draw(names, rows, files[1])
    print(f"{text}table: {files[0]}, {files[1]}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="evaluate", description="Scores of one model or several, by data file or benchmark.")
    parser.add_argument(
        "models_and_tasks",
        nargs="+",
        metavar="HF_DIR... TASKS",
        help="model folders (or NAME=FOLDER); last, tasks with commas between: data files (rows whose last answer "
        "is the reference) or lm-eval's names (gsm8k, mmlu, ceval, arc, ...)",
    )
    parser.add_argument(
        "--control", action="append", help="ask with this token first, such as <think>; may be repeated"
    )
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--max-new-tokens", type=int, help="default 512 for data files, a benchmark's own for it")
    parser.add_argument("--batch-size", type=int, help="default 64 for data files, 8 for benchmarks")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as the folder says")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs that vLLM shares the model between")
    parser.add_argument("--num-fewshot", type=int, help="examples before a benchmark's question; default its own")
    parser.add_argument("--no-chat-template", action="store_true", help="ask benchmarks as plain text")
    parser.add_argument("--include", default="", help="a folder of task files of one's own for lm-eval")
    parser.add_argument("--output", type=Path, help="default outputs/evaluations/<model>-<task>.json")
    parser.add_argument("--table", type=Path, help="of several; default outputs/evaluations/scores (.md and .png)")
    arguments = parser.parse_args(argv)
    if len(arguments.models_and_tasks) < 2:
        parser.error("give at least one model folder, then the tasks")
    return arguments


if __name__ == "__main__":
    run(main)
