"""Scores of one model or several: `bash scripts/7_evaluate.sh HF_DIR... TASKS`, which runs

python -m megatron.sft.evaluate BEFORE AFTER heldout.json,gsm8k --control "<short>" --control "<think>"
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.inference.answer_file import kept_values
from megatron.sft.inference.backends import Decoding
from megatron.sft.inference.chat_model import BACKENDS, DTYPES, ChatModel, check_control, load_chat_model
from megatron.sft.inference.comparison import write_comparison
from megatron.sft.inference.exact_match import exact_match
from megatron.sft.inference.lm_eval_tasks import LmEvalModel, LmEvalSettings, check_tasks
from megatron.sft.inference.model_folder import open_model_folder
from megatron.sft.inference.serving import serve_hint
from megatron.sft.reporting.curves import run_names
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import sha256_of_file, sha256_of_text, write_json

RESULTS = Path("outputs/evaluations")


@dataclass
class Evaluation:
    """One model and how it is asked; it is loaded only if a score is missing."""

    folder: Path
    name: str
    controls: list[str]
    decoding: Decoding
    settings: LmEvalSettings

    @cached_property
    def _chat_model(self) -> ChatModel:
        settings = self.settings
        return load_chat_model(self.folder, settings.dtype, settings.backend, settings.seed, settings.num_gpus)

    @cached_property
    def _lm_eval_models(self) -> dict[str, LmEvalModel]:
        return {control: LmEvalModel(self.folder, self.settings, control) for control in self.controls}

    def result(self, task: str, output: Path) -> dict[str, Any]:
        """The result of one task: from `output` if that is of the same model, data and settings, else written there."""
        fingerprint = self._fingerprint(task)
        if kept := kept_values(output, fingerprint):
            print(f"{self.name}, {task}: kept from before in {output}")
            return dict(kept[0])
        print(f"{self.name}, {task}:", flush=True)
        started = time.monotonic()
        if Path(task).is_file():
            result = exact_match(self._chat_model, Path(task), self.controls, self.decoding, self.settings.limit)
        else:
            modes = {control: model.run(task) for control, model in self._lm_eval_models.items()}
            scores = [score for mode in modes.values() for score in mode["scores"]]
            result = {"task": task, "modes": modes, "scores": scores}
        seconds = round(time.monotonic() - started, 1)
        result = {"model": str(self.folder), "fingerprint": fingerprint, "seconds": seconds, **result}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result)
        print(f"finished in {seconds:.0f} s, everything is in {output}")
        return result

    def _fingerprint(self, task: str) -> str:
        """Of everything that decides the scores. Of the model's files size and time: a checksum would read all weights."""
        found = open_model_folder(self.folder)
        files = (path for folder in found.paths for path in sorted(folder.iterdir()))
        kinds = (".json", ".safetensors", ".jinja")
        model = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.suffix in kinds]
        data = sha256_of_file(Path(task)) if Path(task).is_file() else task
        decoding = {**asdict(self.decoding), "batch_size": 0}
        settings = {**asdict(self.settings), "batch_size": 0, "num_gpus": 0}
        facts = [str(self.folder.resolve()), model, data, self.controls, decoding, settings, self.settings.limit]
        return sha256_of_text(json.dumps(facts))


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
        print(write_comparison(names, models, results, arguments.table or RESULTS / "scores"))
        print(f"serve it: {serve_hint(models[-1])}")
    return 0


def named_models(texts: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Names and folders of the models, each given as FOLDER or as NAME=FOLDER. `UserError` for two of one name."""
    given = [text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text) for text in texts]
    folders = [Path(folder) for _, _, folder in given]
    names = [name or default for (name, _, _), default in zip(given, run_names(folders), strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"several models are named {', '.join(names)}: name them apart, such as before={folders[0]}")
    return names, folders


def _evaluation(arguments: argparse.Namespace, model: Path, name: str, controls: list[str]) -> Evaluation:
    settings = LmEvalSettings(
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens or 0,
        batch_size=arguments.batch_size or LmEvalSettings.batch_size,
        chat_template=not arguments.no_chat_template,
        dtype=arguments.dtype,
        backend=arguments.backend,
        num_gpus=arguments.num_gpus,
        include=arguments.include,
    )
    max_new_tokens = arguments.max_new_tokens or Decoding.max_new_tokens
    decoding = Decoding(max_new_tokens, batch_size=arguments.batch_size or Decoding.batch_size)
    return Evaluation(model, name, controls, decoding, settings)


def _output(arguments: argparse.Namespace, name: str, task: str) -> Path:
    given: Path | None = arguments.output
    return given or RESULTS / f"{name}-{Path(task).stem if Path(task).is_file() else task}.json".replace("/", "-")


def _check(arguments: argparse.Namespace, models: Sequence[Path], tasks: Sequence[str], controls: list[str]) -> None:
    """`UserError` for everything that can be found wrong before a model is loaded."""
    for model in models:
        found = open_model_folder(model)
        if any(controls):
            tokenizer = load_tokenizer(found.tokenizer)
            for control in controls:
                check_control(tokenizer, control)
    for name in ("limit", "max_new_tokens", "batch_size", "num_gpus"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{name.upper()}={value} is too small: give at least 1")
    if not tasks:
        raise UserError("no task is named: give data files or benchmarks, separated by commas, such as gsm8k,mmlu")
    if arguments.output and (len(models) > 1 or len(tasks) > 1):
        raise UserError(f"OUTPUT={arguments.output} is for one model and one task: for several set TABLE")
    names = [task for task in tasks if not Path(task).is_file()]
    for task in names:
        if task.endswith((".json", ".jsonl", ".csv", ".parquet")) or "/" in task:
            raise UserError(f"data file {task} does not exist: check the path")
    if names:
        check_tasks(names, arguments.include)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="evaluate", description="Scores of one model or several, by data file or benchmark.")
    parser.add_argument(
        "models_and_tasks",
        nargs="+",
        metavar="HF_DIR... TASKS",
        help="model folders (or NAME=FOLDER); last, tasks separated by commas: data files (the last answer of a record "
        "is the reference) or lm-eval's names (gsm8k, mmlu, ceval, arc, ...)",
    )
    parser.add_argument("--control", action="append", help="ask with this token first, such as <think>; repeatable")
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--max-new-tokens", type=int, help="default: 512 for data files, the benchmark's limit")
    parser.add_argument("--batch-size", type=int, help="default 64 for data files, 8 for benchmarks")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the folder's")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs over which vLLM splits the model")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question; default: the benchmark's")
    parser.add_argument("--no-chat-template", action="store_true", help="ask benchmarks as plain text")
    parser.add_argument("--include", default="", help="a folder of more task files for lm-eval")
    parser.add_argument("--output", type=Path, help="default outputs/evaluations/<model>-<task>.json")
    parser.add_argument("--table", type=Path, help="for several; default outputs/evaluations/scores (.md and .png)")
    arguments = parser.parse_args(argv)
    if len(arguments.models_and_tasks) < 2:
        parser.error("give at least one model folder, then the tasks")
    return arguments


if __name__ == "__main__":
    run(main)
