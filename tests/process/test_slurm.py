"""Training on a real SLURM of two nodes: submitting, stopping before the time limit, losing a node, arrays, the whole chain."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import slurm_cluster, tiny
from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.timeout(600)

# Two nodes with one process each, which share every layer.
SETTINGS = {
    "NNODES": 2,
    "GPUS_PER_NODE": 1,
    "TENSOR_PARALLEL_SIZE": 2,
    "TRAIN_ITERS": 40,
    "LR_WARMUP_ITERS": 4,
    "LOG_INTERVAL": 1,
    "SAVE_INTERVALS": 15,
    "EVAL_INTERVAL": 1000,
    "STEP_WAIT": 5,
    "TIME_LIMIT": 10,
}
RECIPE = "scripts/sft/SFT_Quickstart.sh"


@dataclass(frozen=True)
class Site:
    """A cluster, and a copy of the repository that its nodes share. The folder's name has a space."""

    cluster: Cluster
    root: Path

    def run(self, *command: object, status: int = 0, **variables: object) -> str:
        return self.cluster.command(*command, status=status, cwd=self.root, **{**SETTINGS, **variables})

    def submit(self, *options: object, status: int = 0, **variables: object) -> str:
        """scripts/cluster/train.sbatch; returns the job's number."""
        output = self.run("bash", "scripts/cluster/train.sbatch", *options, RECIPE, status=status, **variables)
        return output if status else next(line for line in output.splitlines() if line.isdecimal())

    def log(self, job: str) -> str:
        """What a job has printed; nothing before it starts."""
        return "".join(path.read_text() for path in (self.root / "outputs" / "slurm").glob(f"*-{job}.out"))

    def jobs(self) -> set[str]:
        """The numbers of all jobs, ended ones included."""
        return set(self.cluster.command("squeue", "--all", "--states=all", "--noheader", "--format=%A").split())

    def reaches(self, output: Path, iteration: int) -> None:
        """Wait until the run in that folder has done this many steps."""
        done = lambda: (output / "metrics.jsonl").exists() and len(tiny.losses(output)) >= iteration  # noqa: E731
        self.cluster.until(done, f"iteration {iteration} in {output}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if missing := slurm_cluster.missing_programs():
        reason = f"SLURM is not installed ({missing[0]} is missing): apt-get install slurmctld slurmd slurm-client munge"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("slurm") / "shared folder"
    for name in ("scripts", "megatron", "tools"):
        shutil.copytree(tiny.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(tiny.ROOT / "requirements.txt", root / "requirements.txt")
    tiny.run_module("quickstart", "model", root / "assets" / "checkpoints" / "quickstart")
    data = root / "assets" / "data" / "quickstart" / "quickstart.json"
    data.parent.mkdir(parents=True)
    shutil.copyfile(tiny.ROOT / "assets" / "quickstart" / "train.json", data)
    environment = slurm_cluster.shell_environment()
    with slurm_cluster.cluster(tmp_path_factory.mktemp("daemons"), environment) as cluster:
        yield Site(cluster, root)


def test_the_documentation_has_every_setting_of_a_cluster() -> None:
    settings = re.findall(r"^: \"\$\{(\w+):=", (tiny.ROOT / "scripts" / "cluster" / "cluster.env").read_text(), re.M)
    page = (tiny.ROOT / "docs" / "slurm.md").read_text()
    assert len(settings) >= 13
    assert [name for name in settings if f"`{name}`" not in page] == []


def test_the_documentation_s_examples_of_clusters_set_what_the_scripts_read(tmp_path: Path) -> None:
    file = (tiny.ROOT / "scripts" / "cluster" / "cluster.env").read_text()
    page = (tiny.ROOT / "docs" / "slurm.md").read_text().partition("Three examples")[2].partition("\n## ")[0]
    examples = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert len(examples) == 3
    for example in examples:
        names = re.findall(r"\"\$\{(\w+):[=-]", example)
        assert names and {name for name in names if f"${{{name}:" not in file} <= {"MEGATRON_SFT_VENV", "ASSETS_DIR", "HF_HOME"}
        script = f"set -euo pipefail; module() {{ :; }}; SCRATCH=/scratch\n{example}\n{file}\n"
        shown = subprocess.run(
            ["bash", "-c", script + 'echo "${GPU_REQUEST:---gpus-per-node=$GPUS_PER_NODE} $CONTAINER $PARTITION"'],
            env={"PATH": os.environ["PATH"]}, text=True, capture_output=True, check=True,
        )  # fmt: skip
        assert shown.stdout.split()[0] in ("--gres=gpu:a100:4", "--gpus-per-node=8")


def test_what_cannot_run_is_refused_before_nodes_are_requested(site: Site) -> None:
    jobs = site.jobs()
    output = site.submit(status=2, TENSOR_PARALLEL_SIZE=3)
    assert output.splitlines()[-1] == "error: not submitted: no nodes were requested"
    assert "2 processes cannot hold TP 3 x PP 1" in output
    assert "recipe 'no.sh' does not exist" in site.run("bash", "scripts/cluster/train.sbatch", "no.sh", status=2)
    assert "write ARRAY=" in site.submit(status=2, ARRAY="LR 1e-5")
    assert "write --nodes=N" in site.submit("-N2", status=2)
    assert "has no config.json: run scripts/1_download.sh" in site.run(
        *("bash", "scripts/cluster/pipeline.sh", "--slurm", RECIPE), status=2, HF_DIR=site.root / "none"
    )
    assert site.jobs() <= jobs  # SLURM forgets ended ones after a while


@pytest.mark.parametrize("request_", [{}, {"GPU_REQUEST": "--gres=gpu:2"}], ids=["by number", "by gres"])
def test_an_interactive_command_has_the_gpus_and_processors_it_requested(site: Site, request_: dict[str, str]) -> None:
    answer = site.run(
        *(
            "bash",
            "scripts/cluster/interactive.sh",
            "bash",
            "-c",
            'echo "gpus $CUDA_VISIBLE_DEVICES cpus $SLURM_CPUS_PER_TASK"',
        ),
        MEGATRON_SFT_DEVICE="",
        GPUS_PER_NODE=2,
        CPUS_PER_GPU=3,
        **request_,
    )
    assert "gpus 0,1 cpus 6" in answer


def test_the_network_between_two_nodes_is_checked_in_a_step(site: Site) -> None:
    step = ("srun", "--nodes=2", "--ntasks-per-node=1", "--mpi=none")
    answer = site.run(*step, "bash", "tools/check_network", "--megabytes", "1", GPUS_PER_NODE=1)
    assert "2 process(es) on 2 node(s), CPU" in answer and "between nodes, a process of each (2 processes): " in answer
    assert "every result was right" in answer


@dataclass(frozen=True)
class Chain:
    """The four dependent jobs, with training stopped once, and their results."""

    jobs: dict[str, str]
    output: Path
    export: Path


@pytest.fixture(scope="module")
def chain(site: Site) -> Chain:
    """`pipeline.sh --slurm`, with the signal that SLURM sends before the time limit, in the middle of training."""
    output, export = site.root / "outputs" / "chain", site.root / "outputs" / "exported model"
    printed = site.run(
        *("bash", "scripts/cluster/pipeline.sh", "--slurm", RECIPE), OUTPUT_PATH=output, EXPORT_PATH=export, SAVE_INTERVALS=1000
    )
    jobs = dict(line.split(": job ") for line in printed.splitlines() if ": job " in line)
    site.reaches(output, 10)
    site.cluster.command("scancel", "--batch", "--signal=USR1", jobs["train"])
    return Chain(jobs, output, export)


@pytest.fixture(scope="module")
def limited(site: Site, chain: Chain) -> str:
    """A job that needs hours and gets two minutes per start; other tests run meanwhile."""
    site.cluster.wait(chain.jobs["tokenize"])
    return site.submit(
        "--nodes=1",
        OUTPUT_PATH=site.root / "outputs" / "limited",
        TENSOR_PARALLEL_SIZE=1,
        TRAIN_ITERS=1_000_000,
        PRETRAIN_CHECKPOINT_PATH=site.root / "assets" / "checkpoints" / "quickstart_Megatron_TP2PP1",
        TIME_LIMIT=2,
        SAVE_BEFORE_LIMIT=40,
        LOG_INTERVAL=50,
        SAVE_INTERVALS=1_000_000,
    )


@pytest.fixture(scope="module")
def uninterrupted(site: Site, chain: Chain, limited: str) -> list[float]:
    """The losses of an uninterrupted run, submitted by passing the recipe itself to sbatch."""
    site.cluster.wait(chain.jobs["export"])
    output = site.root / "outputs" / "whole"
    printed = site.run("sbatch", "--parsable", "--nodes=2", "--output=whole-%j.out", RECIPE, OUTPUT_PATH=output)
    site.cluster.wait(printed.strip())
    assert len(tiny.losses(output)) == SETTINGS["TRAIN_ITERS"]
    return tiny.losses(output)


def test_convert_tokenise_train_and_export_run_as_dependent_jobs(site: Site, chain: Chain) -> None:
    assert list(chain.jobs) == ["convert", "tokenize", "train", "export"]
    for job in chain.jobs.values():
        site.cluster.wait(job)
    assert (chain.export / "model.safetensors").exists()
    assert json.loads((chain.export / "config.json").read_text())["vocab_size"] == 384


def test_without_slurm_the_chain_runs_the_remaining_steps_in_order(site: Site, chain: Chain) -> None:
    site.cluster.wait(chain.jobs["export"])
    again = site.root / "outputs" / "exported here"
    printed = site.run(
        *("bash", "scripts/cluster/pipeline.sh", RECIPE), OUTPUT_PATH=chain.output, EXPORT_PATH=again, NNODES=1, GPUS_PER_NODE=2
    )
    assert [line for line in printed.splitlines() if line.startswith("== ")] == ["== train", "== export"]
    assert "nothing to do" in printed
    tiny.assert_same_weights(again, chain.export)


def test_a_job_saves_before_its_time_limit_is_requeued_and_ends_with_the_losses_of_a_whole_run(
    site: Site, chain: Chain, uninterrupted: list[float]
) -> None:
    job = site.cluster.wait(chain.jobs["train"])
    log = site.log(chain.jobs["train"])
    assert job["Restarts"] == "1"
    assert "asking the run to save and stop" in log and ": requeued" in log
    assert "resumed at iteration" in log and "after 0 rows" not in log
    assert tiny.losses(chain.output) == uninterrupted


def test_an_array_trains_a_task_for_each_value_in_its_own_folder(site: Site, chain: Chain, limited: str) -> None:
    output = site.root / "outputs" / "array"
    job = site.submit(
        ARRAY="LR=1e-3,2e-3",
        TRAIN_ITERS=6,
        TENSOR_PARALLEL_SIZE=1,
        NNODES=1,
        OUTPUT_PATH=output,
        PRETRAIN_CHECKPOINT_PATH=site.root / "assets" / "checkpoints" / "quickstart_Megatron_TP2PP1",
    )
    for task, value in enumerate(("1e-3", "2e-3")):
        site.cluster.wait(f"{job}_{task}")
        rates = [step["lr"] for step in tiny.metrics(output / f"LR={value}") if "lr" in step]
        assert len(rates) == 6 and max(rates) == float(value)
        assert "finished" in (site.root / "outputs" / "slurm" / f"SFT_Quickstart-{job}_{task}.out").read_text()


def test_a_failed_step_cancels_the_steps_that_depend_on_it(site: Site, chain: Chain, limited: str) -> None:
    damaged, prefix = site.root / "outputs" / "damaged.json", site.root / "outputs" / "tokens"
    damaged.write_text('[{"instruction": "Sort"}]')
    printed = site.run(
        *("bash", "scripts/cluster/pipeline.sh", "--slurm", RECIPE),
        DATA_FILE=damaged,
        DATA_PATH=prefix,
        OUTPUT_PATH=site.root / "outputs" / "none",
    )
    jobs = dict(line.split(": job ") for line in printed.splitlines() if ": job " in line)
    assert list(jobs) == ["tokenize", "train", "export"]  # the model is converted already
    for step, state in (("tokenize", "FAILED"), ("train", "CANCELLED"), ("export", "CANCELLED")):
        site.cluster.wait(jobs[step], state)
    assert not (site.root / "outputs" / "none").exists()


def test_slurms_own_signal_before_the_time_limit_makes_a_job_save_and_resume(site: Site, limited: str) -> None:
    site.cluster.until(lambda: " start 2 of " in site.log(limited) and "requeued" in site.log(limited), "the second start", 200)
    site.cluster.until(lambda: "resumed at iteration" in site.log(limited), "the resumed run")
    site.cluster.command("scancel", limited)
    site.cluster.wait(limited, "CANCELLED")


def test_a_job_that_loses_a_node_resumes_from_its_checkpoint_when_the_node_is_back(
    site: Site, uninterrupted: list[float]
) -> None:
    output = site.root / "outputs" / "lost node"
    printed = site.run(
        *("sbatch", "--parsable", "--nodes=2", "--output=outputs/slurm/%x-%j.out", "scripts/cluster/train.sbatch", RECIPE),
        OUTPUT_PATH=output,
    )
    job = printed.strip()
    site.reaches(output, 20)
    site.cluster.lose_node("n2", job)
    site.cluster.until(lambda: site.cluster.job(job)["JobState"] == "PENDING", "SLURM to notice it")
    site.cluster.start_node("n2")
    assert int(site.cluster.wait(job)["Restarts"]) >= 1
    assert "resumed at iteration 15" in site.log(job)
    assert tiny.losses(output) == uninterrupted
