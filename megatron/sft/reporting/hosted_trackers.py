"""Trackers with a server: Weights & Biases, SwanLab and MLflow. Keys and addresses stay in the environment.

A resumed run continues the tracker's run, whose id is kept in the run's folder.
"""

import os
import re
import secrets
from functools import partial
from pathlib import Path
from typing import Any

from megatron.sft.reporting.tracked_values import tracked_values
from megatron.sft.runtime import ranks
from megatron.sft.runtime.errors import first_line
from megatron.sft.runtime.manifest import write_text

RUN_ID, SWANLAB_ID, MLFLOW_ID = "wandb_run_id.txt", "swanlab_run_id.txt", "mlflow_run_id.txt"
INIT_SECONDS = 30  # how long Weights & Biases may take to answer
PROJECT = "megatron-sft"
_MLFLOW_FORBIDDEN = re.compile(r"[^\w\-. /:]")  # in names of metrics and parameters
_MLFLOW_LONGEST = 500  # characters of a parameter's value


def kept_id(path: Path, num_bytes: int = 4) -> str:
    """The id in this file, created by the first call."""
    if not path.is_file():
        write_text(path, secrets.token_hex(num_bytes) + "\n")
    return path.read_text(encoding="utf-8").strip()


def run_id(folder: Path) -> str:
    """The Weights & Biases id of the run in this folder, created by the first call."""
    return kept_id(folder / RUN_ID)


def _name(folder: Path, variable: str) -> str:
    return os.environ.get(variable) or folder.resolve().name


class WeightsAndBiases:
    """One run of Weights & Biases. wandb reads its key from the environment; nothing here touches it."""

    def __init__(self, folder: Path, settings: dict[str, Any], iteration: int) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        init = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(folder, "WANDB_NAME"),
            id=run_id(folder),
            resume="allow",
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS),
        )
        try:
            self._run: Any = init()
        except Exception as error:  # a compute node without internet, an expired key
            reason = first_line(error)
            ranks.print_rank_0(f"note: Weights & Biases cannot be reached ({reason}): the run is kept offline")
            wandb.teardown()  # or the id would count as in use
            self._run = init(mode="offline")
        offline = bool(self._run.settings._offline)
        place = f"offline; upload it with `wandb sync {folder}/wandb/offline-*`" if offline else self._run.url
        ranks.print_rank_0(f"Weights & Biases: run {self._run.id}, {place}")

    @staticmethod
    def wanted() -> bool:
        """Whether a key is set, or WANDB_MODE=offline."""
        mode = os.environ.get("WANDB_MODE", "online")
        return mode == "offline" or (mode != "disabled" and bool(os.environ.get("WANDB_API_KEY")))

    def write(self, values: dict[str, Any]) -> None:
        # A resumed run repeats the steps that were not saved, with the same results: wandb has them already.
        if values["iteration"] >= self._run.step:
            self._run.log(tracked_values(values), step=values["iteration"])

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """One experiment of SwanLab; SWANLAB_MODE=offline or local keeps it in the run's folder."""

    def __init__(self, folder: Path, settings: dict[str, Any], iteration: int) -> None:
        import swanlab

        mode = os.environ.get("SWANLAB_MODE", "cloud")
        # Experiments that are kept in files cannot be continued: each start of the run is one.
        resume = {"id": kept_id(folder / SWANLAB_ID, 10) + "0", "resume": "allow"} if mode == "cloud" else {}
        self._swanlab: Any = swanlab
        swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            experiment_name=_name(folder, "SWANLAB_EXP_NAME"),
            config=settings,
            logdir=os.environ.get("SWANLAB_LOG_DIR", str(folder / "swanlog")),
            mode=mode,
            **resume,
        )
        ranks.print_rank_0(f"SwanLab: {mode}")

    @staticmethod
    def wanted() -> bool:
        """Whether a key is set, or SWANLAB_MODE=offline or local."""
        mode = os.environ.get("SWANLAB_MODE", "cloud")
        return mode in ("offline", "local") or (mode != "disabled" and bool(os.environ.get("SWANLAB_API_KEY")))

    def write(self, values: dict[str, Any]) -> None:
        self._swanlab.log(tracked_values(values), step=values["iteration"])

    def close(self) -> None:
        self._swanlab.finish()


class MLflow:
    """One run of MLflow at MLFLOW_TRACKING_URI: a server, or a file or database."""

    def __init__(self, folder: Path, settings: dict[str, Any], iteration: int) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        path = folder / MLFLOW_ID
        id = path.read_text(encoding="utf-8").strip() if path.is_file() else None
        run = mlflow.start_run(run_id=id, run_name=None if id else _name(folder, "MLFLOW_RUN_NAME"))
        write_text(path, run.info.run_id + "\n")
        if not id:  # a parameter cannot be changed
            mlflow.log_params({name: str(value)[:_MLFLOW_LONGEST] for name, value in settings.items()})
        self._repeated = self._last_step(run.info.run_id)
        ranks.print_rank_0(f"MLflow: run {run.info.run_id} at {mlflow.get_tracking_uri()}")

    def _last_step(self, id: str) -> int:
        """The last step that this run has, which a resumed one may repeat."""
        history = self._mlflow.MlflowClient().get_metric_history(id, "train/loss")
        return max((metric.step for metric in history), default=-1)

    @staticmethod
    def wanted() -> bool:
        """Whether MLFLOW_TRACKING_URI is set."""
        return bool(os.environ.get("MLFLOW_TRACKING_URI"))

    def write(self, values: dict[str, Any]) -> None:
        step = values["iteration"]
        if "loss" not in values or step > self._repeated:
            metrics = {_MLFLOW_FORBIDDEN.sub("_", name): value for name, value in tracked_values(values).items()}
            self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()
