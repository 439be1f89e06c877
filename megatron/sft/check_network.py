"""Whether the processes of a job can talk, how fast, and right: `bash tools/check_network`, which runs on every GPU of the job

python -m megatron.sft.launch … -m megatron.sft.check_network --megabytes 256
"""

import argparse
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron.sft.runtime import device, ranks
from megatron.sft.runtime.errors import OneLineParser, UserError, leave_message, run
from megatron.sft.runtime.watchdog import HUNG

# What to try where a part does not end. NCCL's own words are in the log with NCCL_DEBUG=INFO.
HINTS = {
    "joining": "the ports above 32768 may be closed between the nodes, or the processes take the wrong network interface: "
    "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the name that `ip address` shows for the nodes' network",
    "within a node": "compare NCCL_P2P_DISABLE=1 (PCIe access control or a virtual machine may break the direct way between "
    "GPUs) and, in a container, a larger /dev/shm (docker: --ipc=host)",
    "between nodes": "set NCCL_SOCKET_IFNAME to the nodes' interface and NCCL_IB_HCA to the InfiniBand cards (mlx5); "
    "NCCL_IB_DISABLE=1 says whether plain TCP works; on RoCE NCCL_IB_GID_INDEX=3 may be missing",
}
# GB/s below which NVLink or PCIe, InfiniBand or RoCE, are probably not used.
SLOW = {"within a node": 10.0, "between nodes": 3.0}


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: all of them, those of one node, or one of each node. where: of HINTS."""

    name: str
    where: str
    ranks: list[int]
    handle: Any


@contextlib.contextmanager
def ends_within(seconds: float, part: str, where: str) -> Iterator[None]:
    """End this process with one line and status 124 if the block takes longer: a collective cannot be interrupted."""

    def give_up() -> None:
        here = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
        leave_message(f"{here} has waited {seconds:g} s for {part}: {HINTS[where]}; NCCL_DEBUG=INFO shows more")
        os._exit(HUNG)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    started = time.monotonic()
    with ends_within(arguments.seconds, "the other processes", "joining"):
        context = device.process_group()
        context.__enter__()
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, (socket.gethostname(), os.environ.get("GROUP_RANK", "0")))
    if len(hosts) == 1:
        raise UserError("one process has no other to talk to: set GPUS_PER_NODE or NNODES to more")
    nodes = list(dict.fromkeys(hosts))
    seconds = time.monotonic() - started
    kind = f"{device.device_name()}, {device.backend()}"
    ranks.print_rank_0(f"{len(hosts)} process(es) on {len(nodes)} node(s), {kind}: met in {seconds:.0f} s")
    for group in _groups(hosts, nodes):
        if dist.get_rank() in group.ranks and len(group.ranks) > 1:
            with ends_within(arguments.seconds, f"{group.name}, the first results", group.where):
                check_results(group)
            with ends_within(arguments.seconds, f"{group.name}, {arguments.megabytes} MB", group.where):
                lines = _speeds(group, arguments.megabytes)
            ranks.print_rank_0("\n".join(lines))
        with ends_within(arguments.seconds, f"the others after {group.name}", group.where):
            dist.barrier()
    ranks.print_rank_0("every result was right")
    context.__exit__(None, None, None)
    return 0


def _groups(hosts: list[Any], nodes: list[Any]) -> list[Group]:
    """Every process makes every group, as torch.distributed asks; reported are those that rank 0 is in."""
    within = [[rank for rank, host in enumerate(hosts) if host == node] for node in nodes]
    wanted = [("within a node", "within a node", members) for members in within]
    if len(nodes) > 1:
        wanted.append(("between nodes, a process of each", "between nodes", [members[0] for members in within]))
        wanted.append(("all processes", "between nodes", list(range(len(hosts)))))
    return [Group(name, where, members, dist.new_group(members)) for name, where, members in wanted]


def check_results(group: Group) -> None:
    """Every collective that training uses, on numbers whose results are known exactly. A `UserError` names what is wrong."""
    size, place = len(group.ranks), group.ranks.index(dist.get_rank())
    total = size * (size + 1) // 2
    numbers = torch.arange(1, 1025, dtype=torch.float32, device=device.current())

    def expect(what: str, got: Tensor, wanted: Tensor) -> None:
        if not torch.equal(got, wanted):
            wrong = int((got != wanted).sum())
            raise UserError(
                f"{what} {group.name} gave {wrong} wrong numbers of {wanted.numel()} on rank {dist.get_rank()} "
                f"({socket.gethostname()}): look for errors of its GPU or network card (nvidia-smi -q, dmesg), exclude it"
            )

    summed = numbers * (place + 1)
    dist.all_reduce(summed, group=group.handle)
    expect("all-reduce", summed, numbers * total)
    gathered = torch.empty(size * len(numbers), device=numbers.device)
    dist.all_gather_into_tensor(gathered, numbers * (place + 1), group=group.handle)
    expect("all-gather", gathered, torch.cat([numbers * (rank + 1) for rank in range(size)]))
    # A ring, as between stages of a pipeline.
    received = torch.empty_like(numbers)
    sending = dist.P2POp(dist.isend, numbers * (place + 1), group.ranks[(place + 1) % size], group.handle)
    receiving = dist.P2POp(dist.irecv, received, group.ranks[place - 1], group.handle)
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()
    expect("send and receive", received, numbers * ((place - 1) % size + 1))


def _speeds(group: Group, megabytes: int) -> list[str]:
    """A line of all-reduce's speed for a small and for the asked size, and what a slow one may mean."""
    size, lines, speed = len(group.ranks), [], 0.0
    for count in dict.fromkeys((1, megabytes)):
        values = torch.zeros(count * 250_000, dtype=torch.float32, device=device.current())
        seconds = _seconds(lambda values=values: dist.all_reduce(values, group=group.handle))  # type: ignore[misc]
        # What each process sends and receives in a ring: NCCL's "bus bandwidth".
        speed = 2 * (size - 1) / size * values.nbytes / seconds / 1e9
        lines.append(f"{group.name} ({size} processes): all-reduce of {count} MB in {1000 * seconds:.2f} ms, {speed:.1f} GB/s")
    if device.has_gpu() and speed < SLOW[group.where]:
        lines.append(f"slow for GPUs: {HINTS[group.where]}")
    return lines


def _seconds(call: Callable[[], object], times: int = 5) -> float:
    """The mean of some calls after two that are not counted."""
    for _ in range(2):
        call()
    device.synchronize()
    started = time.monotonic()
    for _ in range(times):
        call()
    device.synchronize()
    return (time.monotonic() - started) / times


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="check_network", description="Whether the processes of a job can talk, how fast, and right.")
    parser.add_argument("--megabytes", type=int, default=256, help="of the large all-reduce")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a part counts as hanging")
    arguments = parser.parse_args(argv)
    if arguments.megabytes < 1 or arguments.seconds <= 0:
        parser.error(f"--megabytes {arguments.megabytes} and --seconds {arguments.seconds:g} must be above 0")
    return arguments


if __name__ == "__main__":
    run(main, under_torchrun=True)
