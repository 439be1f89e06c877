"""A Python for scripts under test: forks `-m megatron.sft.COMMAND` where a real one would start; for the rest it is a real one.

`fork_server.python()` gives the program for MEGATRON_SFT_PYTHON. Runs of several processes on one machine are forked too,
without `megatron.sft.launch`. A command that talks to a hub is started, as its libraries read where that is when imported.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
from pathlib import Path

PLAIN, MEGATRON = "plain", "megatron"
# These commands know nothing of megatron-core.
WITHOUT_MEGATRON = {
    *("tokenize", "generate", "edit_tokenizer", "quickstart", "evaluate"),
    *("suggest", "show_sample", "repack", "plot"),
}


def kind_of(program: str) -> str:
    """Which of the two servers has what a module or script needs."""
    return PLAIN if program.rpartition(".")[2] in WITHOUT_MEGATRON else MEGATRON


def ask(folder: Path, request: dict[str, object], descriptors: list[int]) -> bytes:
    """The server's answer, or nothing where it has ended. descriptors: for standard input, output and error, or none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / kind_of(str(request["program"]))))
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], descriptors)
        connection.sendall(content)
        with contextlib.suppress(ConnectionResetError):
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
        return b""


def forked(arguments: list[str]) -> tuple[int, str, list[str]] | None:
    """Number of processes (0: no launcher), program and arguments; None for what must be started."""
    environment = os.environ
    if environment.get("MEGATRON_SFT_DEVICE") != "cpu" or environment.get("OMP_NUM_THREADS") != "1":
        return None
    if arguments[:1] != ["-m"] or not arguments[1].startswith("megatron.sft."):
        return None
    program, rest, processes = arguments[1], arguments[2:], 0
    if program == "megatron.sft.launch":
        own, rest = rest[: rest.index("-m")], rest[rest.index("-m") + 1 :]
        program, rest = rest[0], rest[1:]
        if "--standalone" not in own:
            return None
        processes = int(own[own.index("--nproc-per-node") + 1])
    name = program.rpartition(".")[2]
    if name == "download" or (name == "tokenize" and not all(map(_is_here, _inputs(rest)))):
        return None
    return processes, program, rest


def _inputs(arguments: list[str]) -> list[str]:
    """What follows each --input; several may stand in one, on lines or between spaces."""
    values = [value for option, value in itertools.pairwise(arguments) if option == "--input"]
    return [word for value in values for word in value.split()]


def _is_here(data: str) -> bool:
    return Path(data.partition("#")[0]).exists()


def main() -> int:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    found = forked(arguments)
    if found is None:
        os.execv(os.environ["FORK_SERVER_PYTHON"], [os.environ["FORK_SERVER_PYTHON"], *arguments])
    processes, program, rest = found
    request: dict[str, object] = {"program": program, "arguments": rest, "environment": dict(os.environ)}
    request |= {"processes": processes, "seconds": 600, "folder": os.getcwd()}
    answer = ask(folder, request, [0, 1, 2])
    if not answer:
        print("the fork server gave no answer", file=sys.stderr)
        return 1
    status = json.loads(answer)[0]
    return 1 if status is None else status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
