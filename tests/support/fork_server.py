"""Processes in a moment: a server that has imported torch, megatron-core and this package once, and forks what tests ask for.

A start of Python with torch and megatron-core takes seconds of CPU time; a fork takes milliseconds. `run` gives what
`python -m MODULE` or `python SCRIPT` gives, in one process or in several as `megatron.sft.launch` starts them: the exit status
and what was printed. The launcher itself, signals and restarts are tested with real starts.

One process forks (`fork_server.py FOLDER`): it has one thread, no process group and no CUDA context, and it imports no
command, so that `runpy` runs those as `python -m` does. It ends when the process that started it does.
"""

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tests.support.forked_python import MEGATRON, PLAIN, ask

ROOT = Path(__file__).resolve().parents[2]
# Variables of which the server has the values from its start: with others, a process is started. Not those that the package
# sets itself (TORCHDYNAMO_DISABLE, TOKENIZERS_PARALLELISM): a test that calls a command in this process leaves them behind.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "PYTHONPATH", "LD_")
ROOMS = [
    *("runtime", "families", "hf", "model", "checkpoint", "chat"),
    *("data", "reporting", "planning", "training", "inference", "conversion"),
]
STARTS_A_THREAD = ["hub_records.py"]  # pyarrow's allocator
KINDS = (PLAIN, MEGATRON)
_PR_SET_PDEATHSIG = 1


# In the process of the tests.


class ForkServer:
    """The client: starts the server at the first use and ends it with this process. Not for GPUs: libraries for them start
    threads and CUDA when imported."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._environment: dict[str, str] = {}

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether forked processes are as good as started ones with this environment."""
        if must_start():
            return False
        self.start()
        return _import_time(environment) == _import_time(self._environment)

    def run(
        self, program: str, arguments: list[str], environment: dict[str, str], processes: int, seconds: float
    ) -> tuple[int, str]:
        """Exit status and output of a module (a dotted name) or script (a path), with the standard output and error in one.

        processes: 0 for one process as typed, or the number that the launcher would start.
        """
        self.start()
        request = {"program": program, "arguments": arguments, "environment": environment}
        request |= {"processes": processes, "seconds": seconds, "folder": os.getcwd()}
        answer = ask(self._folder, request, [])
        if not answer:
            raise RuntimeError(f"the fork server gave no answer:\n{self._log()}")
        status, output = json.loads(answer)
        if status is None:
            raise subprocess.TimeoutExpired([program, *arguments], seconds, output)
        return status, output

    def python(self) -> dict[str, str]:
        """Variables with which the scripts' Python is `forked_python`."""
        ours = {name: environment_of_runs()[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "MEGATRON_SFT_DEVICE")}
        if must_start():
            return {**ours, "MEGATRON_SFT_PYTHON": sys.executable}
        self.start()
        return {**ours, "MEGATRON_SFT_PYTHON": str(self._folder / "python"), "FORK_SERVER_PYTHON": sys.executable}

    def start(self) -> None:
        if self._process is not None:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="fork-server."))
        client = self._folder / "python"
        command = [sys.executable, "-SE", str(ROOT / "tests" / "support" / "forked_python.py"), str(self._folder)]
        client.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        client.chmod(0o755)
        self._environment = environment_of_runs()
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", str(self._folder)],
                cwd=ROOT,
                # What is forked talks to no hub.
                env=self._environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"},
                stdin=subprocess.PIPE,  # ends when this process does
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        atexit.register(self.end)
        while not all((self._folder / kind).exists() for kind in KINDS):
            if self._process.poll() is not None:
                raise RuntimeError(f"the fork server ended with status {self._process.returncode}:\n{self._log()}")
            time.sleep(0.01)

    def _log(self) -> str:
        return (self._folder / "log").read_text()[-4000:]

    def end(self) -> None:
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)


SERVER = ForkServer()


def must_start() -> bool:
    """Asked for, or on a machine with GPUs."""
    return os.environ.get("TESTS_START_PROCESSES") == "1" or shutil.which("nvidia-smi") is not None


def environment_of_runs(on_gpu: bool = False) -> dict[str, str]:
    """This process's environment with what a test's run needs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    device = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if on_gpu else {"MEGATRON_SFT_DEVICE": "cpu"}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **device}


def _import_time(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


# In the server.


def main() -> None:
    folder = Path(sys.argv[1])
    sockets = {}
    for kind in KINDS:
        sockets[kind] = socket.socket(socket.AF_UNIX)
        sockets[kind].bind(str(folder / f".{kind}"))
        sockets[kind].listen(64)
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    for kind in KINDS:
        os.rename(folder / f".{kind}", folder / kind)
    other = os.fork()
    if other == 0:
        _end_with_parent()
        sockets.pop(PLAIN).close()
        from megatron.sft.runtime import device

        device.prepare()
        _import_rooms()
        from tests.support import no_picture  # noqa: F401

        _serve(sockets[MEGATRON])
    sockets.pop(MEGATRON).close()
    _serve(sockets[PLAIN], needed=other)


def _import_rooms() -> None:
    """All modules of the package but the commands at its top; a room's optional packages may be missing."""
    for room in ROOMS:
        for path in sorted((ROOT / "megatron" / "sft" / room).glob("*.py")):
            if path.name in STARTS_A_THREAD:
                continue
            with contextlib.suppress(ImportError):
                __import__(f"megatron.sft.{room}.{path.stem}".removesuffix(".__init__"))


def _serve(listening: socket.socket, needed: int = 0) -> NoReturn:
    """Fork a process for each connection until the client ends, or the process `needed` does."""
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork copies one of them"
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitpid(-1, os.WNOHANG)[0]:
                if ended == needed:
                    os._exit(1)
        if sys.stdin in ready:
            os._exit(0)
        if listening in ready:
            connection, _ = listening.accept()
            if os.fork() == 0:
                _end_with_parent()
                listening.close()
                _as_process(lambda: _answer(connection))  # noqa: B023 - runs now
            connection.close()


def _end_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _as_process(body: Callable[[], object]) -> NoReturn:
    """What an interpreter does around a program: the exit status, threads, functions of atexit, buffers."""
    status = 1
    try:
        body()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


# In the process that answers one request, and in those that it forks.


def _answer(connection: socket.socket) -> None:
    size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    content = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    request = json.loads(content)
    folder = Path(tempfile.mkdtemp(prefix="forked."))  # a TemporaryDirectory would end with the first child
    if not descriptors:
        output = os.open(folder / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        descriptors = [os.open(os.devnull, os.O_RDONLY), output, output]
    with _ranks(request) as ranks:
        children = {_fork(request, rank, folder, descriptors): int(rank["RANK"]) for rank in ranks}
    status = _wait(children, request, folder, connection)
    message = _message(folder) if status and request["processes"] else ""
    os.write(descriptors[2], message.encode())
    output = (folder / "output").read_text(errors="replace") if (folder / "output").exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    connection.sendall(json.dumps([status, output]).encode())
    connection.close()


@contextlib.contextmanager
def _ranks(request: dict[str, Any]) -> Iterator[list[dict[str, str]]]:
    """What torchrun's agent gives each process in its environment, and the store where they meet."""
    count = request["processes"]
    if not count:
        yield [{"RANK": "0"}]
        return
    listening = socket.socket(socket.AF_INET)
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listening.getsockname()[1]),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(count)),
        **dict.fromkeys(("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"), "0"),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MEGATRON_SFT_LAUNCHER_PID": str(os.getpid()),
        "MEGATRON_SFT_STARTED": str(time.time()),
    }
    yield [common | dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)) for rank in range(count)]
    # Only now: it has a thread.
    from torch.distributed import TCPStore

    port = listening.getsockname()[1]
    request["store"] = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _fork(request: dict[str, Any], rank: dict[str, str], folder: Path, descriptors: list[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    _end_with_parent()
    for target, source in enumerate(descriptors):
        os.dup2(source, target)
    os.closerange(3, 256)
    # For the life of this process; the server's own were made for other files.
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout = open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["processes"]:
        os.environ.update(rank, TORCHELASTIC_ERROR_FILE=str(folder / f"error{rank['RANK']}.json"))
    os.chdir(request["folder"])
    program = request["program"]
    sys.argv = [program, *request["arguments"]]
    if program.endswith(".py"):
        sys.path[0] = str(Path(program).parent)
        _as_process(lambda: runpy.run_path(program, run_name="__main__"))
    sys.path[0] = request["folder"]
    _as_process(lambda: runpy.run_module(program, run_name="__main__", alter_sys=True))


def _wait(running: dict[int, int], request: dict[str, Any], folder: Path, connection: socket.socket) -> int | None:
    """The exit status, of several processes that of the first to fail, as the launcher's; None after the time."""
    deadline = time.monotonic() + request["seconds"]
    status: int | None = 0
    while running:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank, ended = running.pop(pid), os.waitstatus_to_exitcode(code)
            if ended and not status:
                status = 128 - ended if ended < 0 and request["processes"] else ended
                deadline = time.monotonic() + 2
                with contextlib.suppress(OSError):
                    (folder / f"error{rank}.json").rename(folder / "error.json")
        elif time.monotonic() > deadline or not _is_there(connection):
            status = status or None
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.005)
    return status


def _is_there(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True


def _message(folder: Path) -> str:
    """What the first process to fail has left, as the launcher prints it."""
    try:
        return f"error: {json.loads((folder / 'error.json').read_text())['message']['message']}\n"
    except OSError:
        return ""


if __name__ == "__main__":
    main()
