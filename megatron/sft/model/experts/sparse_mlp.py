"""A mixture of experts in place of the MLP: each token goes to the few experts that a router chooses for it."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.sft.families.architecture import MoEConfig
from megatron.sft.model.experts.casts import Cast, can_multiply, cast_rows
from megatron.sft.model.experts.grouped_linear import GroupedLinear
from megatron.sft.model.experts.routed_rows import (
    RoutedRows,
    combine_rows,
    ends_of,
    expert_bias,
    gather_rows,
    permuted,
    routed_rows,
    weighted_swiglu,
    weighted_swiglu_and_cast,
    write_rows,
    write_weighted_swiglu,
)
from megatron.sft.model.experts.router import Router
from megatron.sft.model.experts.shared import SharedExperts
from megatron.sft.model.inputs import PackedRows
from megatron.sft.model.recomputation import recompute
from megatron.sft.runtime import device


class Experts(MegatronModule):
    """This process's experts: gate and up projection, activation and down projection of each."""

    def __init__(self, config: TransformerConfig, moe: MoEConfig, activation: str) -> None:
        """activation: as in `swiglu`."""
        super().__init__(config=config)
        self.activation = activation
        self.split = parallel_state.get_expert_tensor_parallel_world_size()
        spread = config.expert_model_parallel_size
        self.num_local = config.num_moe_experts // spread
        width = config.moe_ffn_hidden_size // self.split
        self.in_8_bits = bool(config.fp8) and can_multiply(device.current())
        options = {"dtype": config.params_dtype, "bias": moe.expert_bias, "in_8_bits": self.in_8_bits}
        self.linear_fc1 = GroupedLinear(self.num_local, 2 * width, config.hidden_size, **options)
        self.linear_fc2 = GroupedLinear(self.num_local, config.hidden_size, width, **options)
        for dimension, linear in ((1, self.linear_fc1), (2, self.linear_fc2)):
            for parameter in linear.parameters():
                set_tensor_model_parallel_attributes(parameter, True, dimension, 1)
                # Unless all processes hold all experts: the gradient is summed over those that hold the same.
                parameter.allreduce = spread == 1  # type: ignore[attr-defined]
        if moe.expert_bias and spread == 1 and self.split > 1:
            # Whole on every tensor-parallel rank, which adds it to its part of the tokens (`SparseMLP`).
            whole: Any = self.linear_fc2.bias
            whole.tensor_model_parallel, whole.sequence_parallel = False, config.sequence_parallel

    def forward(
        self, rows: Tensor, weights: Tensor, ends: Tensor, again: bool, write: Any = None, cast: Cast | None = None
    ) -> Tensor:
        """rows [n, hidden size] sorted by expert, each row's weight [n] in float32; the weighted results [n, hidden size].

        Without the bias of the down projection. again: the activation's results are freed and computed again in the backward
        pass. write: fills `rows` again, likewise. cast: the rows in 8 bits.
        """
        gate_up, values = self.linear_fc1(rows, ends, cast)
        bias = None if values is None else expert_bias(values, ends, len(rows))
        if self.in_8_bits:
            written = not again or reads_16_bits(self.linear_fc2)
            active, cast = weighted_swiglu_and_cast(gate_up, weights, self.activation, bias, written)
        else:
            active, cast = weighted_swiglu(gate_up, weights, self.activation, bias), None
        results, _ = self.linear_fc2(active, ends, cast)
        if write is not None:
            recompute(rows, gate_up, write)
        if again:
            fill = partial(write_weighted_swiglu, gate_up.detach(), weights.detach(), kind=self.activation, bias=bias)
            recompute(active, results, fill)
        return results

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each local expert's parts: experts are a dimension of the stored tensors, after that of layers."""
        rank = parallel_state.get_expert_tensor_parallel_rank()
        first = self.num_local * parallel_state.get_expert_model_parallel_rank()
        copies = parallel_state.get_expert_data_parallel_rank()
        found = {}
        axes = {
            "linear_fc1.weight": (0, 2),
            "linear_fc1.bias": (0, 2),
            "linear_fc2.weight": (1, 1),
            "linear_fc2.bias": (None, 1),
        }
        for name, parameter in self.named_parameters():
            if name not in axes:
                continue  # an adapter's
            axis, blocks = axes[name]
            for index, matrix in enumerate(parameter.data.unbind(0)):
                for block, part in enumerate(matrix.chunk(blocks, dim=0)):
                    key = f"{prefix}experts.{name}"
                    offsets = [*sharded_offsets, (len(sharded_offsets), first + index, self.config.num_moe_experts)]
                    lead, replica = len(offsets), (0, rank if axis is None else 0, copies)
                    if axis is not None:
                        offsets.append((lead + axis, block * self.split + rank, blocks * self.split))
                    found[f"{key}.{index}.{block}"] = ShardedTensor.from_rank_offsets(
                        key, part, *offsets, replica_id=replica, prepend_axis_num=lead
                    )
        return found


def reads_16_bits(linear: GroupedLinear) -> bool:
    """Whether the forward product takes more of its rows than their cast: an adapter does."""
    return hasattr(linear, "adapter")


class SparseMLP(MegatronModule):
    """Router and experts, spread over expert-parallel ranks or split over tensor-parallel ones, and shared experts."""

    def __init__(self, config: TransformerConfig, moe: MoEConfig, linear: tuple[type, type], activation: str = "silu") -> None:
        """linear: the classes of the column- and the row-parallel layer. activation: of the experts, as in `swiglu`."""
        super().__init__(config=config)
        self.router = Router(config, moe)
        self.experts = Experts(config, moe, activation)
        self.shared_experts = SharedExperts(config, moe, linear) if moe.shared_width else None
        self.spread = config.expert_model_parallel_size

    def forward(self, hidden: Tensor, packed: PackedRows, again: bool) -> tuple[Tensor, None]:
        """[t / TP with sequence parallelism, 1, hidden size] to the same. again: as in `Experts`, rows included."""
        flat = hidden.squeeze(1)
        weights, chosen = self.router(flat, packed)
        # First, so that the processes that exchange rows need not wait for each other at once.
        shared = None if self.shared_experts is None else self.shared_experts(hidden, again)
        mixed = self._mixed(flat, weights, chosen, again)
        if self.experts.linear_fc2.bias is not None:
            mixed = mixed + self._output_bias(weights, chosen)
        return (mixed.unsqueeze(1) if shared is None else shared + mixed.unsqueeze(1)), None

    def _mixed(self, flat: Tensor, weights: Tensor, chosen: Tensor, again: bool) -> Tensor:
        """[t, hidden size]: each token's weighted sum of what its experts give."""
        if self.experts.split > 1:
            return self._over_tensor_parallel(flat, weights, chosen, again)
        rows = routed_rows(chosen, self.config.num_moe_experts)
        compute = self._spread_out if self.spread > 1 else self._here
        return combine_rows(compute(flat, weights, rows, again), rows)

    def _output_bias(self, weights: Tensor, chosen: Tensor) -> Tensor:
        """[t, hidden size]: each token's weighted sum of the biases of its experts' down projections."""
        bias: Any = self.experts.linear_fc2.bias
        if self.spread > 1:
            # The backward pass sums what every process gives for its tokens.
            group = parallel_state.get_expert_model_parallel_group()
            bias = tensor_parallel.gather_from_sequence_parallel_region(bias, tensor_parallel_output_grad=True, group=group)
        shares = weights.new_zeros(len(weights), len(bias)).scatter(1, chosen, weights)
        return (shares @ bias.float()).to(bias.dtype)

    def _here(self, flat: Tensor, weights: Tensor, rows: RoutedRows, again: bool) -> Tensor:
        """[n, hidden size]: results of the rows, all experts being on this process."""
        in_8_bits = self.experts.in_8_bits
        # Each token is cast once, for all its rows.
        cast = cast_rows(flat.detach()).rows(rows.tokens) if in_8_bits else None
        inputs = gather_rows(flat, rows, not (again and in_8_bits) or reads_16_bits(self.experts.linear_fc1))
        write = partial(write_rows, flat.detach(), rows) if again else None
        return self.experts(inputs, weights.flatten()[rows.order], rows.ends, again, write, cast)

    def _over_tensor_parallel(self, flat: Tensor, weights: Tensor, chosen: Tensor, again: bool) -> Tensor:
        """Every rank computes a part of each expert's width, for all tokens; the parts' results are summed."""
        group = parallel_state.get_expert_tensor_parallel_group()
        if self.config.sequence_parallel:
            flat = tensor_parallel.gather_from_sequence_parallel_region(flat, group=group)
            weights = tensor_parallel.gather_from_sequence_parallel_region(weights, group=group)
            chosen = tensor_parallel.gather_from_sequence_parallel_region(chosen, group=group)
        else:
            flat = tensor_parallel.copy_to_tensor_model_parallel_region(flat, group=group)
            weights = tensor_parallel.copy_to_tensor_model_parallel_region(weights, group=group)
        rows = routed_rows(chosen, self.config.num_moe_experts)
        part = combine_rows(self._here(flat, weights, rows, again), rows)
        if self.config.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(part, group=group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(part, group=group)

    def _spread_out(self, flat: Tensor, weights: Tensor, rows: RoutedRows, again: bool) -> Tensor:
        """[n, hidden size]: results of the rows, each computed by the process that holds its expert.

        The one wait for the device is for the numbers of rows that go from each process to each.
        """
        group, local = parallel_state.get_expert_model_parallel_group(), self.experts.num_local
        ends = torch.cat([rows.ends.new_zeros(1), rows.ends])
        sent = ends.diff().view(self.spread, local)  # to each process, by its experts
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent.contiguous(), group=group)
        to, from_ = torch.stack([sent.sum(dim=1), received.sum(dim=1)]).tolist()
        inputs = tensor_parallel.all_to_all(group, gather_rows(flat, rows), from_, to)
        scales = tensor_parallel.all_to_all(group, weights.flatten()[rows.order].unsqueeze(1), from_, to)
        # From each process they come sorted by expert; here they are sorted by expert alone.
        experts = torch.arange(local, device=flat.device).repeat(self.spread)
        experts = torch.repeat_interleave(experts, received.flatten(), output_size=sum(from_))
        sorted_experts, order = torch.sort(experts, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        inputs, scales = permuted(inputs, order, inverse), permuted(scales, order, inverse)
        results = self.experts(inputs, scales.squeeze(1), ends_of(sorted_experts, local), again)
        return tensor_parallel.all_to_all(group, permuted(results, inverse, order), to, from_)
