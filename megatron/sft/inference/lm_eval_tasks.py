"""Benchmarks by name, run by lm-eval, which is imported only where a task of it is asked for."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.sft.inference.scores import Score
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError, first_line

# Names that other projects' scripts use, and lm-eval's.
ALIASES = {"ceval": "ceval-valid", "arc": "ai2_arc", "arc_c": "arc_challenge", "arc_e": "arc_easy"}
END_THINK = "</think>"


@dataclass(frozen=True)
class BenchmarkSettings:
    """num_fewshot: None is the task's own. max_new_tokens: 0 is the task's own. include: a folder of task files."""

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
class Benchmarks:
    """One model as lm-eval asks it, loaded at the first task. control: what every answer begins with."""

    folder: Path
    settings: BenchmarkSettings
    control: str = ""
    _model: Any = field(default=None, repr=False)

    def run(self, task: str) -> dict[str, Any]:
        """lm-eval's results of a task or group, without its samples, and the scores to be shown."""
        lm_eval = imported()
        settings = self.settings
        manager = lm_eval.tasks.TaskManager(verbosity="ERROR", include_path=settings.include or None)
        name = _known_task(task, manager.all_tasks)
        tokens = {"max_gen_toks": settings.max_new_tokens} if settings.max_new_tokens else None
        try:
            with _without_bars():
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
        scores = scores_of(results, self.control)
        for score in scores:
            print(f"{score.task}: {score.metric} {score.text}", flush=True)
        return {"task": name, "settings": asdict(settings), **kept, "scores": [asdict(score) for score in scores]}

    def _load(self, lm_eval: Any) -> Any:
        settings = self.settings
        if settings.backend == "vllm":
            if self.control:
                raise UserError(f"CONTROL={self.control} works with BACKEND=transformers only: leave one of them out")
            arguments = {
                "pretrained": str(self.folder),
                "dtype": settings.dtype,
                "tensor_parallel_size": settings.num_gpus,
                "seed": settings.seed,
            }
            return lm_eval.api.registry.get_model("vllm")(**arguments)
        return lm_eval.api.registry.get_model("hf")(
            pretrained=str(self.folder),
            tokenizer=self._tokenizer(),
            device=str(device.current()),
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            trust_remote_code=False,
            think_end_token=END_THINK if END_THINK in self._tokenizer().get_vocab() else None,
        )

    def _tokenizer(self) -> Any:
        """With a chat template that has every answer begin with the control token."""
        from megatron.sft.chat.encoding import load_tokenizer

        tokenizer = load_tokenizer(self.folder, template_needed=self.settings.chat_template)
        if self.control:
            tokenizer.chat_template += "{% if add_generation_prompt %}{{ " + repr(self.control) + " }}{% endif %}"
        return tokenizer


def imported() -> Any:
    """The package lm_eval, quiet."""
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


def _without_bars() -> contextlib.AbstractContextManager[object]:
    """lm-eval draws its bars into log files, too, and has no setting for it; what goes wrong it raises."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def check_tasks(tasks: Sequence[str], include: str) -> None:
    """Refuse what lm-eval does not have, before any model is loaded."""
    all_tasks = imported().tasks.TaskManager(verbosity="ERROR", include_path=include or None).all_tasks
    for task in tasks:
        _known_task(task, all_tasks)


def _known_task(task: str, all_tasks: Sequence[str]) -> str:
    """lm-eval's name of a task. An unknown one is refused with those that are like it."""
    import difflib

    name = ALIASES.get(task, task)
    if name not in all_tasks:
        near = difflib.get_close_matches(name, all_tasks, n=5, cutoff=0.5)
        like = f"; it has {', '.join(near)}" if near else ""
        raise UserError(f"{task} is no file, and no task of lm-eval{like}: correct it (lm-eval ls tasks lists all)")
    return name


def scores_of(results: dict[str, Any], control: str) -> list[Score]:
    """The groups' figures, and those of tasks that are in no group that has figures."""
    groups = results.get("groups") or {}
    members = {name for group in groups for name in results.get("group_subtasks", {}).get(group, [])}
    shown = {**results["results"], **groups}
    scores = []
    for task, values in shown.items():
        if task in members:
            continue
        directions = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not filter_name:
                continue
            name = metric if filter_name == "none" else f"{metric}, {filter_name}"
            error = values.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                Score(
                    task,
                    f"{name}, {control}" if control else name,
                    float(value),
                    error if isinstance(error, float) else None,
                    directions.get(metric),
                )
            )
    return scores


def _advice(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what is missing"
    return "its data comes from the Hugging Face hub: set HF_ENDPOINT to a mirror, or fill HF_HOME where there is a network"
