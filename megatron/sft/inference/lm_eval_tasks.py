"""Benchmarks by name, run by lm-eval, which is imported only if one of its tasks is asked for."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft.inference.model_folder import adapter_rank, open_model_folder
from megatron.sft.inference.scores import Score
from megatron.sft.runtime.errors import UserError, first_line

# Names that the scripts of other projects use, and lm-eval's names for the same tasks.
ALIASES = {"ceval": "ceval-valid", "arc": "ai2_arc", "arc_c": "arc_challenge", "arc_e": "arc_easy"}
END_THINK = "</think>"


@dataclass(frozen=True)
class LmEvalSettings:
    """num_fewshot: None for the task's number. max_new_tokens: 0 for the task's limit. include: a folder of more task files."""

    num_fewshot: int | None = None
    limit: int | None = None
    max_new_tokens: int = 0
    batch_size: int = 8
    chat_template: bool = True
    dtype: str = "auto"
    backend: str = "transformers"
    num_gpus: int = 1
    seed: int = 1234
    include: str = ""


@dataclass
class LmEvalModel:
    """One model as lm-eval asks it, loaded at the first task. control: the token that every answer begins with, or empty."""

    folder: Path
    settings: LmEvalSettings
    control: str = ""
    _model: Any = field(default=None, repr=False)

    def run(self, task: str) -> dict[str, Any]:
        """lm-eval's results of a task or group without its samples, the settings, and `scores` as JSON; prints each score.

        `UserError` for an unknown task, or if its data or a package is missing.
        """
        lm_eval = import_lm_eval()
        settings = self.settings
        manager = lm_eval.tasks.TaskManager(verbosity="ERROR", include_path=settings.include or None)
        name = _known_task(task, manager.all_tasks)
        tokens = {"max_gen_toks": settings.max_new_tokens} if settings.max_new_tokens else None
        try:
            with _bars_on_terminal_only():
                self._model = self._model or self._load(lm_eval)
                results = lm_eval.simple_evaluate(
                    model=self._model,
                    tasks=[name],
                    num_fewshot=settings.num_fewshot,
                    limit=settings.limit,
                    apply_chat_template=settings.chat_template,
                    fewshot_as_multiturn=settings.chat_template,
                    gen_kwargs=tokens,
                    task_manager=manager,
                    log_samples=False,
                    random_seed=settings.seed,
                    numpy_random_seed=settings.seed,
                    torch_random_seed=settings.seed,
                    fewshot_random_seed=settings.seed,
                )
        except (OSError, ConnectionError, ValueError, ImportError) as error:
            raise UserError(f"task {name} cannot be run ({first_line(error)}): {_advice(error)}") from error
        kept = {key: results.get(key) for key in ("results", "groups", "versions", "n-shot", "n-samples")}
        scores = task_scores(results, self.control)
        for score in scores:
            print(f"{score.task}: {score.metric} {score.text}", flush=True)
        return {"task": name, "settings": asdict(settings), **kept, "scores": [asdict(score) for score in scores]}

    def _load(self, lm_eval: Any) -> Any:
        settings = self.settings
        found = open_model_folder(self.folder)
        arguments: dict[str, Any] = {"pretrained": str(found.model), "dtype": settings.dtype}
        if settings.backend == "vllm":
            if self.control:
                raise UserError(f"CONTROL={self.control} works with BACKEND=transformers only: unset one of them")
            arguments |= {"tensor_parallel_size": settings.num_gpus, "seed": settings.seed, "tokenizer": str(found.tokenizer)}
            if found.adapter:
                arguments |= {"lora_local_path": str(found.adapter), "max_lora_rank": max(8, adapter_rank(found.adapter))}
            return lm_eval.api.registry.get_model("vllm")(**arguments)
        from megatron.sft.runtime import device  # with torch, which takes seconds

        tokenizer = self._tokenizer()
        if found.adapter:
            arguments["peft"] = str(found.adapter)
        return lm_eval.api.registry.get_model("hf")(
            **arguments,
            tokenizer=tokenizer,
            device=str(device.current()),
            batch_size=settings.batch_size,
            trust_remote_code=False,
            think_end_token=END_THINK if END_THINK in tokenizer.get_vocab() else None,
        )

    def _tokenizer(self) -> Any:
        """The model's tokenizer; its chat template ends the prompt with the control token."""
        from megatron.sft.chat.encoding import load_tokenizer

        tokenizer = load_tokenizer(open_model_folder(self.folder).tokenizer, template_needed=self.settings.chat_template)
        if self.control:
            tokenizer.chat_template += "{% if add_generation_prompt %}{{ " + repr(self.control) + " }}{% endif %}"
        return tokenizer


def import_lm_eval() -> Any:
    """The package lm_eval with its log off. `UserError` if it is not installed."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    try:
        import lm_eval
        import lm_eval.api.registry
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"tasks by name need the package lm-eval ({first_line(error)}): pip install 'lm-eval[hf]', or give a data file"
        ) from None
    return lm_eval


def _bars_on_terminal_only() -> contextlib.AbstractContextManager[object]:
    """Hides stderr if it is a log file: lm-eval draws progress bars there and has no setting for it. Errors it raises."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def check_tasks(tasks: Sequence[str], include: str) -> None:
    """`UserError` for a task that lm-eval does not have; loads no model."""
    all_tasks = import_lm_eval().tasks.TaskManager(verbosity="ERROR", include_path=include or None).all_tasks
    for task in tasks:
        _known_task(task, all_tasks)


def _known_task(task: str, all_tasks: Sequence[str]) -> str:
    """lm-eval's name of a task. `UserError`, with similar names, for an unknown one."""
    import difflib

    name = ALIASES.get(task, task)
    if name not in all_tasks:
        near = difflib.get_close_matches(name, all_tasks, n=5, cutoff=0.5)
        similar = f"; similar ones are {', '.join(near)}" if near else ""
        raise UserError(f"{task} is neither a file nor a task of lm-eval{similar}: see `lm-eval ls tasks`")
    return name


def task_scores(results: dict[str, Any], control: str) -> list[Score]:
    """Scores from lm-eval's results: of groups, and of tasks that are not in a group with figures."""
    groups = results.get("groups") or {}
    members = {name for group in groups for name in results.get("group_subtasks", {}).get(group, [])}
    scores = []
    for task, values in {**results["results"], **groups}.items():
        directions = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            # METRIC,FILTER or METRIC_stderr,FILTER; what has no filter, such as `alias`, is not a score.
            metric, _, kind = key.partition(",")
            if task in members or metric.endswith("_stderr") or not kind or not isinstance(value, int | float):
                continue
            name = ", ".join(filter(None, (metric, "" if kind == "none" else kind, control)))
            error = values.get(f"{metric}_stderr,{kind}")
            error = error if isinstance(error, float) else None  # "N/A" where it is not known
            scores.append(Score(task, name, float(value), error, directions.get(metric)))
    return scores


def _advice(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what is missing"
    return "its data comes from the Hugging Face hub: set HF_ENDPOINT to a mirror, or fill HF_HOME where there is a network"
