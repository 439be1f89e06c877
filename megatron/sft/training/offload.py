"""AdamW with a share of its state in CPU memory: OPTIMIZER_OFFLOAD.

Master weights and both moments of that share lie in the CPU's memory, in float32. A step cuts their gradients into pieces:
while the CPU steps one, the next come from the GPU and new weights go back, so that a step takes the longest of the three. The
other parameters are stepped where they are. Every element is computed alone, by the same formula, however it is cut.
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from megatron.sft.runtime.errors import UserError
from megatron.sft.training.adamw import InPlaceAdamW

# Elements of a piece, and how many are under way: 32 MB of gradients each.
_PIECE, _UNDER_WAY = 1 << 23, 4
# Master weight and two moments, in float32.
_BYTES_PER_PARAMETER = 12


class OffloadedAdamW(InPlaceAdamW):
    """`InPlaceAdamW`'s place in megatron-core, with float32 states: `master_param`, `exp_avg` and `exp_avg_sq`.

    share: of the parameters' elements, whose states are in CPU memory; set before the first step. Weights of any dtype.
    """

    share = 1.0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._away: set[Tensor] | None = None
        self._transfers: _Transfers | None = None

    @property
    def away(self) -> set[Tensor]:
        """The parameters whose state is in CPU memory: the largest ones that the share has room for."""
        if self._away is None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            room, self._away = round(self.share * sum(map(torch.numel, parameters))), set()
            for parameter in sorted(parameters, key=torch.numel, reverse=True):
                if parameter.numel() <= room:
                    self._away.add(parameter)
                    room -= parameter.numel()
        return self._away

    def initialize_state(self, parameter: Tensor, *_: Any) -> None:
        """Zero moments, and the weights as master weights."""
        place = torch.device("cpu") if parameter in self.away else parameter.device
        master = parameter.detach().to(place, copy=True).float()
        moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        self.state[parameter] = {**moments, "master_param": master}

    def check_memory(self) -> None:
        """A `UserError` if this machine's memory does not hold the states of its processes."""
        num_bytes = sum(map(torch.numel, self.away)) * _BYTES_PER_PARAMETER
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = psutil.virtual_memory().available
        if num_bytes * processes > free:
            raise UserError(
                f"OPTIMIZER_OFFLOAD={self.share:g} needs {num_bytes * processes / 1e9:.1f} GB of CPU memory for {processes} "
                f"process{'es' if processes > 1 else ''}, and {free / 1e9:.1f} GB are free: take a smaller share"
            )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        work: list[_Piece] = []
        for parameter, gradient, group in self.begin_step():
            work += _pieces(parameter, gradient, self.state[parameter], group, parameter in self.away)
        here, away = [[piece for piece in work if piece.is_away == wanted] for wanted in (False, True)]
        if away:
            self._transfers = self._transfers or _Transfers(away[0].weights.is_cuda)
            self._transfers.begin(away)
        for piece in here:
            piece.step(piece.gradient, self.grad_scale)
            piece.weights.copy_(piece.master)
        if away and self._transfers:
            with _all_cores():
                self._transfers.finish(self.grad_scale)


@dataclass(frozen=True)
class _Piece:
    """Consecutive elements of a parameter: weights and gradient on the GPU, master weights and moments where the state is."""

    weights: Tensor
    gradient: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    group: dict[str, Any]
    is_away: bool

    def step(self, gradient: Tensor, grad_scale: float) -> None:
        """torch's AdamW of the master weights, in one pass over memory. gradient: float32, next to them; it is changed."""
        count = torch.tensor(float(self.group["step"]), device=self.master.device)
        (beta1, beta2), lr = self.group["betas"], self.group["lr"]
        if grad_scale != 1.0:
            gradient.mul_(grad_scale)
        torch._fused_adamw_(
            [self.master], [gradient], [self.exp_avg], [self.exp_avg_sq], [], [count], lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=self.group["weight_decay"], eps=self.group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip


def _pieces(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], is_away: bool
) -> Iterator[_Piece]:
    tensors = (parameter.detach(), gradient, state["master_param"], state["exp_avg"], state["exp_avg_sq"])
    for weights, part, master, first, second in zip(*(each.view(-1).split(_PIECE) for each in tensors), strict=True):
        yield _Piece(weights, part, master, first, second, group, is_away)


class _Transfers:
    """Gradients on their way to the CPU and weights on their way back, in page-locked buffers that are used again.

    Each direction has its own stream. Where the GPU is the CPU, the same copies are made at once.
    """

    def __init__(self, pinned: bool) -> None:
        self._incoming, self._outgoing = torch.cuda.Stream(), torch.cuda.Stream()
        buffers = [torch.empty(_PIECE, dtype=torch.float32, pin_memory=pinned) for _ in range(2 * _UNDER_WAY)]
        self._gradients, self._weights = buffers[:_UNDER_WAY], buffers[_UNDER_WAY:]
        self._sent: list[Any] = [None] * _UNDER_WAY
        self._coming: deque[tuple[_Piece, Tensor, Any]] = deque()
        self._left: deque[_Piece] = deque()

    def begin(self, pieces: list[_Piece]) -> None:
        """The first gradients start to come."""
        self._incoming.wait_stream(torch.cuda.current_stream())
        self._left.extend(pieces)
        for buffer in self._gradients:
            self._fetch(buffer)

    def finish(self, grad_scale: float) -> None:
        """Step all pieces. The GPU's next work waits for the new weights; this process does not."""
        self._outgoing.wait_stream(torch.cuda.current_stream())
        index = 0
        while self._coming:
            piece, buffer, arrived = self._coming.popleft()
            arrived.synchronize()
            piece.step(buffer[: len(piece.master)], grad_scale)
            self._fetch(buffer)
            self._send(piece, index)
            index = (index + 1) % _UNDER_WAY
        torch.cuda.current_stream().wait_stream(self._outgoing)

    def _fetch(self, buffer: Tensor) -> None:
        if not self._left:
            return
        piece = self._left.popleft()
        with torch.cuda.stream(self._incoming):
            buffer[: len(piece.gradient)].copy_(piece.gradient, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._coming.append((piece, buffer, arrived))

    def _send(self, piece: _Piece, index: int) -> None:
        if self._sent[index] is not None:
            self._sent[index].synchronize()
        rounded = self._weights[index].view(piece.weights.dtype)[: len(piece.master)]
        rounded.copy_(piece.master)
        with torch.cuda.stream(self._outgoing):
            piece.weights.copy_(rounded, non_blocking=True)
            self._sent[index] = torch.cuda.Event()
            self._sent[index].record()


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """While open, torch computes on this process's part of the machine's cores; launchers leave it one thread."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(before, cores, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
