"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, in one folder, on free ports, stopped by pid."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=6
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
{nodes}
PartitionName=debug Nodes={names} Default=YES DefMemPerNode=1000 State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """The daemons, and the commands of its user. `environment` is the user's shell."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {**environment, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._write_configuration()
        key, munge = self.folder / "munge.key", "munged"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "seed-file")]
        self._daemon(munge, "--foreground", "--force", f"--key-file={key}", f"--log-file={self.folder}/munge.log", *files)
        self.until(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.command("sinfo", "-h", "-o", "%T").split() == ["idle"], "two idle nodes")

    def _write_configuration(self) -> None:
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 Gres=gpu:2"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        values = {"folder": self.folder, "host": host, "user": getpass.getuser(), "controller": ports[0]}
        text = CONFIG.format(**values, nodes="\n".join(lines), names=",".join(NODES))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "plugstack.conf").write_text("")
        # SLURM wants a device file for each GPU; these are never used.
        devices = "".join(f"NodeName={','.join(NODES)} Name=gpu File=/dev/{name}\n" for name in ("null", "zero"))
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{devices}")

    def start_node(self, node: str) -> None:
        self._daemon(node, "-D", "-N", node, program="slurmd")

    def _daemon(self, name: str, *arguments: str, program: str = "") -> None:
        command = [shutil.which(program or name, path=PATH) or name, *arguments]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def stop(self) -> None:
        """End all jobs, then the daemons, newest first."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.command("scancel", "--user", getpass.getuser())
            with_deadline(lambda: not self.command("squeue", "-h"), 20)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def command(self, *arguments: object, status: int = 0, **variables: object) -> str:
        """What a command prints, stdout and stderr; `variables` are added to its environment."""
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        cwd = environment.pop("cwd", None)
        result = subprocess.run(
            [str(argument) for argument in arguments],
            env=environment,
            cwd=cwd,
            text=True,
            timeout=120,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert result.returncode == status, f"{arguments} gave {result.returncode}:\n{result.stdout}"
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, StdOut, ..."""
        text = self.command("scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text)) | dict(re.findall(r"^ +(StdOut|Command)=(.*)$", text, re.M))

    def wait(self, number: str, state: str = "COMPLETED", seconds: float = 300) -> dict[str, str]:
        """Wait for a job's end, which must be `state`."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.job(number)["JobState"] in final, f"the end of job {number}", seconds)
        found = self.job(number)
        assert found["JobState"] == state, f"job {number} is {found['JobState']}:\n{Path(found['StdOut']).read_text()[-6000:]}"
        return found

    def lose_node(self, node: str, job: str) -> None:
        """What a power cut does: slurmd, the job's slurmstepd on that node and its processes end immediately."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        processes = _processes_of(node, job)
        for pid in {_parent_of(pid) for pid in processes} - {*processes, 0, 1} | processes:
            if pid in processes or b"slurmstepd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 240) -> None:
        if not with_deadline(holds, seconds):
            logs = "".join(f"\n== {log.name}\n{log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
            raise AssertionError(f"waited {seconds} s for {what}; {self.command('squeue')}{logs}")


def with_deadline(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it becomes true within that time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@contextmanager
def cluster(folder: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """A running cluster; everything that it started is ended afterwards."""
    result = Cluster(folder, environment)
    try:
        result.start()
        yield result
    finally:
        result.stop()


def shell_environment() -> dict[str, str]:
    """A user's shell without settings of this project or of a job around the tests."""
    kept = ("HOME", "USER", "LOGNAME", "LANG", "TERM", "TMPDIR")
    variables = {name: os.environ[name] for name in kept if name in os.environ}
    return variables | {"MEGATRON_SFT_PYTHON": sys.executable, "MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _processes_of(node: str, job: str) -> set[int]:
    """The processes that a node runs for a job: SLURM puts both into their environment."""
    wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_JOB_ID={job}".encode()}
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.add(int(folder.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def _parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^PPid:\s+(\d+)", status, re.M)
    return int(match.group(1)) if match else 0
