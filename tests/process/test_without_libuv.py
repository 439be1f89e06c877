"""Processes that meet without libuv, as with a torch that was built without it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import tiny

WORKER = """
import os
import torch
from torch.distributed.distributed_c10d import _get_default_store
from megatron.sft.runtime import device, stores, watchdog

with device.process_group():
    store = _get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    own = watchdog.open_store()
    own.add("met", 1)
    torch.distributed.barrier()
    os.write(1, f"libuv {store.libuvBackend} {own.libuvBackend}, {int(own.get('met'))} met\\n".encode())
"""
# A torch without it, whose stores refuse, in every process.
SITE = """
from torch.distributed import TCPStore

make = TCPStore.__init__
def refuse(store, *arguments, use_libuv=True, **named):
    if use_libuv:
        raise RuntimeError("use_libuv was requested but PyTorch was build without libuv support")
    make(store, *arguments, use_libuv=use_libuv, **named)
TCPStore.__init__ = refuse
"""


def test_processes_start_and_meet_with_a_torch_without_libuv(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    arguments = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", str(tmp_path / "worker.py")]
    environment = os.environ | {"PYTHONPATH": f"{tiny.ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1", "MEGATRON_SFT_DEVICE": "cpu"}
    environment.pop("USE_LIBUV", None)
    command = [sys.executable, "-m", "megatron.sft.launch", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, 2 * "libuv False False, 2 met\n"), done.stderr[-2000:]
