"""`tools/check_network`: processes of two nodes that talk, one that does not come, and a wrong result."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny

TOOL = tiny.ROOT / "tools" / "check_network"
# Rank 1 never joins: as behind a closed port.
ABSENT = """
import os, sys, time
from megatron.sft import check_network
from megatron.sft.runtime.errors import run
if os.environ["RANK"] == "1":
    time.sleep(60)
run(lambda: check_network.main(["--seconds", "6"]))
"""
# One number of a sum is wrong, as from a broken card.
BROKEN = """
import sys
from torch import distributed as dist
from megatron.sft import check_network
from megatron.sft.runtime.errors import run
whole = dist.all_reduce
def all_reduce(values, **options):
    whole(values, **options)
    values[7] += 1
dist.all_reduce = all_reduce
run(lambda: check_network.main(["--megabytes", "1"]))
"""


def environment(**more: object) -> dict[str, str]:
    given = {"MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": 1, "MEGATRON_SFT_PYTHON": sys.executable, "PYTHONPATH": tiny.ROOT}
    return os.environ | {name: str(value) for name, value in (given | more).items()}


@pytest.mark.timeout(240)
def test_two_nodes_of_two_processes_talk() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            ["bash", str(TOOL), "--megabytes", "2"],
            env=environment(NNODES=2, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GPUS_PER_NODE=2),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    first, _ = (node.communicate(timeout=200)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], first
    assert "4 process(es) on 2 node(s), CPU" in first and first.splitlines()[-1] == "every result was right"
    for group in ("within a node (2", "between nodes, a process of each (2", "all processes (4"):
        assert f"{group} processes): all-reduce of 1 MB in " in first and f"{group} processes): all-reduce of 2 MB in " in first


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("program", "status", "expected"),
    [(ABSENT, 124, "has waited 6 s for the other processes: "), (BROKEN, 2, "all-reduce within a node gave 1 wrong numbers")],
    ids=["a process that does not come", "a wrong result"],
)
def test_what_is_wrong_is_named_with_what_to_try(program: str, status: int, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(program)
    command = [sys.executable, "-m", "megatron.sft.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=200, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    last = done.stderr.splitlines()[-1]
    assert expected in last
    assert ("NCCL_SOCKET_IFNAME" if status == 124 else "nvidia-smi") in last
