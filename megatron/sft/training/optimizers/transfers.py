"""Between a GPU and the CPU's optimizer: gradients come, a thread steps them in CPU memory, new weights go back.

Three things happen at once, each in its own order: gradients are copied on one stream as they become final, a thread of this
process steps what has arrived, the parameters that the forward pass needs first before the others, and a second stream takes
the new weights back. Nothing here waits for a parameter that was not asked for. Where the GPU is the CPU, copies are made at
once, and the thread is the same.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import PriorityQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.sft.checkpoint.staging import lock_pages
from megatron.sft.runtime import device

# Elements that are stepped and sent at a time: their gradient, states and new weights stay in the CPU's caches meanwhile.
_PIECE = 1 << 21


class Factors(NamedTuple):
    """The scalars of a parameter's step, as they are when the step begins. step: counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float


class Shard:
    """A parameter, or the part of it that this process steps, whose state is in CPU memory.

    place: its position in the forward pass, different for each. weights: [n], on the GPU. buffer: [n] float32 in page-locked
    memory. state: `master_param`, `exp_avg` and `exp_avg_sq` of `OffloadedAdamW`. arrived: the event after which the buffer
    holds a gradient to be stepped; None if none was asked for. stepped: gives the event after which `weights` are the new
    ones; None when nothing is left to wait for.
    """

    def __init__(self, place: int, weights: Tensor) -> None:
        self.place, self.weights = place, weights
        self.buffer = torch.empty(0)
        self.state: dict[str, Tensor] = {}
        self.arrived: Any = None
        self.stepped: Future[Any] | None = None


class Transfers:
    """The streams, the buffer and the thread of one process, for all its optimizers. Its methods are the main thread's."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self._buffer = torch.empty(0)
        self._incoming, self._outgoing = torch.cuda.Stream(), torch.cuda.Stream()
        # Place, shard, after which its gradient has arrived, and its step's scalars.
        self._work: PriorityQueue[tuple[int, Shard, Any, Factors]] = PriorityQueue()
        self._thread = ThreadPoolExecutor(1, "optimizer", _use_all_cores, (device.current(), _cores()))
        before = torch.get_num_threads()
        self._thread.submit(int).result()
        # What the thread has set for itself holds for threads that start later, too, until it is set again.
        torch.set_num_threads(before)

    def add(self, place: int, weights: Tensor) -> Shard:
        """A new shard; all must be added before the first `fetch`."""
        self.shards.append(Shard(place, weights))
        return self.shards[-1]

    def fetch(self, gradients: Sequence[tuple[Shard, Tensor]], reduced: Any = None) -> None:
        """Copy gradients into the shards' buffers, after the current stream's work and, if given, after `reduced`.

        The gradients, [n] float32, must not change before `release`. reduced: the handle of a collective.
        """
        if not gradients:
            return
        if not self.shards[0].buffer.numel():
            self._allocate()
        # A buffer may still hold weights on their way.
        self.wait(shard for shard, _ in gradients)
        self._incoming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._incoming), torch.no_grad():
            if reduced is not None:
                reduced.wait()
            for shard, gradient in gradients:
                shard.buffer.copy_(gradient, non_blocking=True)
                shard.arrived = torch.cuda.Event(blocking=True)
                shard.arrived.record()

    def release(self) -> None:
        """The current stream's next work may overwrite gradients: it waits for their copies, and they are forgotten."""
        torch.cuda.current_stream().wait_stream(self._incoming)
        for shard in self.shards:
            shard.arrived = None

    def step(self, work: Iterable[tuple[Shard, Factors]]) -> None:
        """Have fetched gradients stepped; returns at once. Read weights and states after `wait`."""
        self._outgoing.wait_stream(torch.cuda.current_stream())
        for shard, factors in work:
            arrived, shard.arrived, shard.stepped = shard.arrived, None, Future()
            self._work.put((shard.place, shard, arrived, factors))
            self._thread.submit(self._next)

    def wait(self, shards: Iterable[Shard] | None = None) -> None:
        """Until the states of these shards, or of all, are stepped; the current stream waits until the weights are back.

        What the thread could not do is raised here.
        """
        for shard in self.shards if shards is None else shards:
            if shard.stepped is not None:
                torch.cuda.current_stream().wait_event(shard.stepped.result())
                shard.stepped = None

    def _allocate(self) -> None:
        sizes = [shard.weights.numel() for shard in self.shards]
        self._buffer = torch.zeros(sum(sizes))
        if self.shards[0].weights.is_cuda:
            lock_pages(self._buffer)
        for shard, part in zip(self.shards, self._buffer.split(sizes), strict=True):
            shard.buffer = part

    def _next(self) -> None:
        """In the thread: the queued shard that the forward pass needs first."""
        _, shard, arrived, factors = self._work.get()
        stepped = shard.stepped
        assert stepped is not None
        try:
            arrived.synchronize()
            stepped.set_result(self._step(shard, factors))
        except BaseException as error:
            stepped.set_exception(error)

    @torch.no_grad()
    def _step(self, shard: Shard, factors: Factors) -> Any:
        flat = [shard.state[name].view(-1) for name in ("master_param", "exp_avg", "exp_avg_sq")]
        tensors = (shard.weights.detach().view(-1), shard.buffer, *flat)
        with torch.cuda.stream(self._outgoing):
            for weights, buffer, master, first, second in zip(*(each.split(_PIECE) for each in tensors), strict=True):
                step_elements(master, buffer, first, second, factors)
                rounded = buffer.view(weights.dtype)[: len(weights)]
                rounded.copy_(master)
                weights.copy_(rounded, non_blocking=True)
            sent = torch.cuda.Event()
            sent.record()
        return sent


def step_elements(master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Factors) -> None:
    """torch's AdamW in one pass over memory. All float32, of one shape and on one device; the gradient is changed, too."""
    if factors.grad_scale != 1.0:
        gradient.mul_(factors.grad_scale)
    count = torch.full((), float(factors.step), device=master.device)  # waits for no GPU, unlike torch.tensor
    torch._fused_adamw_(
        [master], [gradient], [exp_avg], [exp_avg_sq], [], [count], lr=factors.lr, beta1=factors.beta1, beta2=factors.beta2,
        weight_decay=factors.weight_decay, eps=factors.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _cores() -> int:
    """This process's part of the machine's cores, but one: the main thread needs it to keep the GPU busy."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)


def _use_all_cores(gpu: torch.device, cores: int) -> None:
    torch.set_num_threads(cores)  # of operations that this thread calls; launchers leave a process one
    if gpu.type == "cuda":
        torch.cuda.set_device(gpu)  # a new thread's device is GPU 0
