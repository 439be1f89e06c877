"""The optimizer's state in the shape of the parameters: master weights and moments, of which each rank saves its share.

To save it for any layout, megatron-core first gathers all of it on every data-parallel rank. Here each rank names the slices
that its share consists of, so nothing is gathered, and experts that are spread over processes need no special case.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megatron.sft.checkpoint.model_shards import is_saved_copy, slices_of_range, tensors_by_parameter
from megatron.sft.checkpoint.moment_codes import decoded, set_codes
from megatron.sft.checkpoint.shard_slice import ShardSlice
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.sizes import weight_shape
from megatron.sft.families.weight_names import weight_entries
from megatron.sft.runtime import device

KINDS = ("param", "exp_avg", "exp_avg_sq")
PREFIX = "optimizer.state"
_PIECE = 1 << 24


@dataclass(frozen=True)
class Share:
    """The elements `start` to `stop` of a flattened parameter, whose optimizer state this process holds."""

    optimizer: Any
    parameter: nn.Parameter
    start: int
    stop: int

    def tensor(self, kind: str) -> Tensor:
        """[stop - start] float32: master weights ("param") or a moment ("exp_avg", "exp_avg_sq")."""
        held, state = self._held()
        if kind == "param":
            return master_weights(held, state).detach().view(-1)
        if kind not in state:  # no step has been taken yet, or all were skipped
            return torch.zeros_like(held, dtype=torch.float32).view(-1)
        if state[kind].dtype == torch.uint8:
            return decoded(state, kind).view(-1)
        return state[kind].detach().float().view(-1)

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor], step: int) -> None:
        """Replace all KINDS by float32 tensors of the same length, and the number of steps taken."""
        _, state = self._held()
        if "step" in state:
            # torch's AdamW counts its steps next to the moments.
            state["step"].fill_(float(step))
        for kind in ("exp_avg", "exp_avg_sq"):
            if state[kind].dtype == torch.uint8:
                set_codes(state, kind, tensors[kind])
            else:
                state[kind].copy_(tensors[kind].view_as(state[kind]))
        self.fill_master(tensors["param"])

    @torch.no_grad()
    def fill_master(self, values: Tensor) -> None:
        """Replace the float32 master weights, [stop - start]."""
        held, state = self._held()
        if not state and hasattr(self.optimizer.optimizer, "allocate"):  # InPlaceAdamW: lower halves are state
            self.optimizer.optimizer.initialize_state(held)
            held, state = self._held()
        master = values.view_as(held)
        if "master_param" not in state:
            held.copy_(master)
        elif state["master_param"].dtype == torch.int16:
            rounded, state["master_param"][:] = split_master_weights(master.to(held.device))
            held.copy_(rounded)
        else:
            state["master_param"].copy_(master)

    @property
    def held(self) -> Tensor:
        """[stop - start], what the optimizer steps."""
        group, place = self.optimizer.model_param_group_index_map[self.parameter]
        held: Tensor = self.optimizer.optimizer.param_groups[group]["params"][place]
        return held

    def _held(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The tensor that the optimizer steps, and its state, which has the master weights where they are another tensor."""
        return self.held, self.optimizer.optimizer.state.get(self.held, {})


def master_weights(weights: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The float32 master weights of `weights`, of which an optimizer with 16-bit states holds the lower halves only."""
    master = state.get("master_param")
    if master is None:
        return weights.float()
    return master if master.dtype != torch.int16 else join_master_weights(weights, master)


def join_master_weights(weights: Tensor, lower: Tensor) -> Tensor:
    """float32 master weights of bfloat16 weights and their int16 lower halves, in the weights' shape.

    The weight was rounded up where the lower half, read with a sign, is negative (Transformer Engine stores them the same way).
    """
    master = torch.empty_like(weights, dtype=torch.float32)
    for high, low, joined in zip(*map(_pieces, (weights.view(torch.int16), lower, master)), strict=True):
        wide = low.int()
        joined.copy_((((high.int() - (wide < 0).int()) << 16) | (wide & 0xFFFF)).view(torch.float32))
    return master


def split_master_weights(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 weights and the int16 lower halves of float32 `master`. Inverse of `join_master_weights`."""
    master = master.contiguous()
    weights, lower = torch.empty_like(master, dtype=torch.int16), torch.empty_like(master, dtype=torch.int16)
    for bits, high, low in zip(*map(_pieces, (master.view(torch.int32), weights, lower)), strict=True):
        low.copy_(bits)  # keeps the lower 16 bits
        high.copy_((bits >> 16) + (low < 0).int())
    return weights.view(torch.bfloat16), lower


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Its elements in pieces, so that what is computed of one takes little memory."""
    return tensor.view(-1).split(_PIECE)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """megatron-core's optimizers: one, and a second for experts that are spread over processes."""
    return [inner for inner in optimizer.chained_optimizers if not getattr(inner, "is_stub_optimizer", False)]


def shares(optimizer: Any) -> Iterator[Share]:
    """What this process holds of the optimizer's state."""
    for inner in inner_optimizers(optimizer):
        for buffer in inner.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield Share(inner, parameter, ranges["param"].start, ranges["param"].end)


def optimizer_slices(optimizer: Any, tensors: list[ShardedTensor]) -> list[ShardSlice]:
    """The slices of optimizer state that this process writes. `tensors`: megatron-core's descriptions of the parameters."""
    all_shares = list(shares(optimizer))
    parts = tensors_by_parameter(tensors, {share.parameter: None for share in all_shares})
    slices: list[ShardSlice] = []
    for share in all_shares:
        saved = [part for part in parts[share.parameter] if is_saved_copy(part)]
        for kind in KINDS:
            slices += _slices(share, saved, kind, partial(share.tensor, kind))
    return slices


def values_without_state(architecture: Architecture, frozen: frozenset[str]) -> dict[str, int]:
    """How many values of each stored tensor of the optimizer's state are of frozen weights, which have no state.

    A stored tensor has a weight of all layers. frozen: names in the family's table.
    """
    counts: Counter[str] = Counter()
    for entry in weight_entries(architecture) if frozen else ():
        if entry.megatron in frozen:
            counts.update(
                {f"{PREFIX}.{kind}.{entry.stored_key}": prod(weight_shape(architecture, entry.rule)) for kind in KINDS}
            )
    return counts


def _slices(share: Share, parts: list[ShardedTensor], kind: str, flat: Callable[[], Tensor]) -> Iterator[ShardSlice]:
    """The slices of the share's state of one kind, whose values are those of `flat()`, [stop - start]."""
    for part, first, last in slices_of_range(share.parameter, parts, share.start, share.stop):
        values = partial(_part_of, flat, first, last)
        yield replace(part, key=f"{PREFIX}.{kind}.{part.key}", dtype=torch.float32, values=values)


def _part_of(flat: Callable[[], Tensor], first: int, last: int) -> Tensor:
    return flat()[first:last]


def load_optimizer(
    optimizer: Any, tensors: list[ShardedTensor], read: Callable[[list[ShardSlice]], None], record: dict[str, Any]
) -> None:
    """Fill the state from a checkpoint: `read` fills slices in CPU memory, `record` is what `optimizer_record` returned."""
    for inner in inner_optimizers(optimizer):
        _allocate(inner, record)
    all_shares = list(shares(optimizer))
    parts = tensors_by_parameter(tensors, {share.parameter: None for share in all_shares})
    for share in all_shares:
        loaded = {kind: torch.zeros(share.stop - share.start) for kind in KINDS}
        # One share at a time, so that only its state is in memory twice.
        read([s for kind in KINDS for s in _slices(share, parts[share.parameter], kind, partial(loaded.__getitem__, kind))])
        share.fill(loaded, int(record["step"]))


def fill_master_weights(optimizer: Any, tensors: list[ShardedTensor], read: Callable[[list[ShardSlice]], None]) -> None:
    """Set the master weights alone; `read` fills slices of them in CPU memory."""
    all_shares = list(shares(optimizer))
    parts = tensors_by_parameter(tensors, {share.parameter: None for share in all_shares})
    for share in all_shares:
        values = {"param": torch.zeros(share.stop - share.start)}
        read(list(_slices(share, parts[share.parameter], "param", partial(values.__getitem__, "param"))))
        share.fill_master(values["param"])


def optimizer_record(optimizer: Any) -> dict[str, Any]:
    """What is not a tensor of a parameter's shape: the number of steps taken, and fp16's loss scale with its counters.

    Every rank must call it: one that holds nothing trained has counted no steps.
    """
    steps = torch.tensor(_step(inner_optimizers(optimizer)), device=device.current())
    torch.distributed.all_reduce(steps, op=torch.distributed.ReduceOp.MAX)
    record: dict[str, Any] = {"step": int(steps)}
    for inner in inner_optimizers(optimizer):
        if inner.grad_scaler is not None:
            scaler = inner.grad_scaler.state_dict()
            record["loss_scale"] = {k: v.item() if isinstance(v, Tensor) else v for k, v in scaler.items()}
    return record


def _step(optimizers: list[Any]) -> int:
    """Steps taken, the same for all parameters. FusedAdam counts them in the parameter group, torch next to the moments."""
    for inner in optimizers:
        for group in inner.optimizer.param_groups:
            if group["params"] and "step" in group:
                return int(group["step"])
        for state in inner.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
    return 0


def _allocate(inner: Any, record: dict[str, Any]) -> None:
    """Allocate the state of an optimizer that has not taken a step yet, and set its step and loss scale from `record`."""
    if isinstance(inner.optimizer, torch.optim.AdamW):
        _allocate_torch(inner.optimizer)
    elif hasattr(inner.optimizer, "allocate"):  # training.optimizers.adamw.InPlaceAdamW
        inner.optimizer.allocate(int(record["step"]))
    else:  # Transformer Engine's FusedAdam, whose load_state_dict would have all of the moments in memory twice
        for group in inner.optimizer.param_groups:
            group["step"] = int(record["step"])
            for parameter in group["params"]:
                inner.optimizer.initialize_state(parameter, False)
    if inner.grad_scaler is not None and "loss_scale" in record:
        scaler = inner.grad_scaler.state_dict()
        inner.grad_scaler.load_state_dict(
            {
                name: torch.full_like(scaler[name], value) if isinstance(scaler.get(name), Tensor) else value
                for name, value in record["loss_scale"].items()
            }
        )


def _allocate_torch(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            on_device = group.get("fused") or group.get("capturable")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }
