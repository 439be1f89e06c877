"""A mixture of experts in place of the MLP: each token goes to the few experts that a router chooses for it."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.sft.model.experts.grouped_linear import GroupedLinear
from megatron.sft.model.experts.routed_rows import (
    RoutedRows,
    combine_rows,
    ends_of,
    gather_rows,
    permuted,
    routed_rows,
    weighted_swiglu,
    write_rows,
    write_weighted_swiglu,
)
from megatron.sft.model.recomputation import recompute


class Router(nn.Module):
    """Chooses each token's experts and their weights, in float32. weight: [experts, hidden size]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        weight: Any = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size, dtype=config.params_dtype))
        # Each tensor-parallel rank routes its part of the tokens; megatron-core sums the gradients.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [t, hidden size] to (weights [t, chosen] float32, experts [t, chosen] int64)."""
        scores: Tensor = _Scores.apply(hidden, self.weight)
        chosen = self.config.moe_router_topk
        if self.config.moe_router_pre_softmax:
            weights, experts = scores.softmax(dim=-1).topk(chosen, dim=-1)
        else:
            values, experts = scores.topk(chosen, dim=-1)
            weights = values.softmax(dim=-1)  # sums to 1
        return weights, experts


class _Scores(torch.autograd.Function):
    """hidden @ weight^T in float32, keeping both as they are."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_weight = (gradient.t() @ hidden.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return (gradient @ weight.float()).to(hidden.dtype), of_weight


class Experts(MegatronModule):
    """This process's experts: gate and up projection, SwiGLU and down projection of each."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.split = parallel_state.get_expert_tensor_parallel_world_size()
        spread = config.expert_model_parallel_size
        self.num_local = config.num_moe_experts // spread
        width = config.moe_ffn_hidden_size // self.split
        self.linear_fc1 = GroupedLinear(self.num_local, 2 * width, config.hidden_size, config.params_dtype)
        self.linear_fc2 = GroupedLinear(self.num_local, config.hidden_size, width, config.params_dtype)
        for dimension, linear in ((1, self.linear_fc1), (2, self.linear_fc2)):
            weight: Any = linear.weight
            set_tensor_model_parallel_attributes(weight, True, dimension, 1)
            weight.allreduce = spread == 1  # else its gradient is summed over the ranks that hold the same experts

    def forward(self, rows: Tensor, weights: Tensor, ends: Tensor, again: bool, write: Any = None) -> Tensor:
        """rows [n, hidden size] sorted by expert, each row's weight [n] in float32; the weighted results [n, hidden size].

        again: SwiGLU's results are freed and computed again in the backward pass. write: fills `rows` again, likewise.
        """
        gate_up, _ = self.linear_fc1(rows, ends)
        active = weighted_swiglu(gate_up, weights)
        results, _ = self.linear_fc2(active, ends)
        if write is not None:
            recompute(rows, gate_up, write)
        if again:
            recompute(active, results, partial(write_weighted_swiglu, gate_up.detach(), weights.detach()))
        return results

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each local expert's parts: experts are a dimension of the stored tensors, after that of layers."""
        rank = parallel_state.get_expert_tensor_parallel_rank()
        first = self.num_local * parallel_state.get_expert_model_parallel_rank()
        copies = parallel_state.get_expert_data_parallel_rank()
        found = {}
        for name, axis, blocks in (("linear_fc1", 0, 2), ("linear_fc2", 1, 1)):
            for index, matrix in enumerate(getattr(self, name).weight.data.unbind(0)):
                for block, part in enumerate(matrix.chunk(blocks, dim=0)):
                    key = f"{prefix}experts.{name}.weight"
                    place = (block * self.split + rank, blocks * self.split)
                    offsets = [*sharded_offsets, (len(sharded_offsets), first + index, self.config.num_moe_experts)]
                    lead = len(offsets)
                    found[f"{key}.{index}.{block}"] = ShardedTensor.from_rank_offsets(
                        key, part, *offsets, (lead + axis, *place), replica_id=(0, 0, copies), prepend_axis_num=lead
                    )
        return found


class SparseMLP(MegatronModule):
    """Router and experts, spread over expert-parallel ranks or split over tensor-parallel ones."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.spread = config.expert_model_parallel_size

    def forward(self, hidden: Tensor, again: bool) -> tuple[Tensor, None]:
        """[t / TP with sequence parallelism, 1, hidden size] to the same. again: as in `Experts`, rows included."""
        flat = hidden.squeeze(1)
        weights, chosen = self.router(flat)
        if self.experts.split > 1:
            return self._over_tensor_parallel(flat, weights, chosen, again).unsqueeze(1), None
        rows = routed_rows(chosen, self.config.num_moe_experts)
        compute = self._spread_out if self.spread > 1 else self._here
        results = compute(flat, weights, rows, again)
        return combine_rows(results, rows).unsqueeze(1), None

    def _here(self, flat: Tensor, weights: Tensor, rows: RoutedRows, again: bool) -> Tensor:
        """[n, hidden size]: results of the rows, all experts being on this process."""
        inputs = gather_rows(flat, rows)
        write = partial(write_rows, flat.detach(), rows) if again else None
        return self.experts(inputs, weights.flatten()[rows.order], rows.ends, again, write)

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
