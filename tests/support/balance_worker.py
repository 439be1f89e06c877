"""Compares the loss of unevenly loaded experts with transformers' in one parallel layout: balance_worker.py TP CP EP SP CONFIG.

A router with a random weight routes a row of conversations with padding between them; every process holds its part of it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megatron.sft.data.tokenized import Row
from megatron.sft.families.registry import read_architecture
from megatron.sft.model import process_groups
from megatron.sft.model.config import transformer_config
from megatron.sft.model.context_parallel import ContextPart
from megatron.sft.model.experts.balance import load_of
from megatron.sft.model.experts.router import Router
from megatron.sft.model.layout import Layout
from megatron.sft.runtime import device
from megatron.sft.training.batches import make_micro_batch

LENGTHS = (13, 7, 22)
SCALE = 0.37


def main() -> None:
    tp, cp, ep, sp = map(int, sys.argv[1:5])
    architecture = read_architecture(json.loads(Path(sys.argv[5]).read_text()), sys.argv[5])
    moe = architecture.moe
    assert moe is not None
    layout = Layout(tp, context_parallel=cp, expert_parallel=ep, sequence_parallel=bool(sp))
    with process_groups.parallel(layout):
        router = Router(transformer_config(architecture, layout), moe)
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(sum(LENGTHS), architecture.hidden_size, generator=generator)
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        part = ContextPart(parallel_state.get_context_parallel_rank(), cp)
        row = Row(np.arange(sum(LENGTHS)), np.ones(sum(LENGTHS), dtype=bool), np.array(LENGTHS))
        batch = make_micro_batch([row], tp, "token", device.current(), part=part)
        # This process's tokens, with numbers for padding that would show.
        padded = torch.full((batch.tokens.shape[1], architecture.hidden_size), 5.0)
        real = batch.packed.real
        here = torch.ones(len(padded), dtype=torch.bool) if real is None else real
        padded[here] = hidden[batch.tokens[0][here]]
        rank = parallel_state.get_tensor_model_parallel_rank() if sp else 0
        mine = padded.chunk(tp if sp else 1)[rank].clone().requires_grad_()
        packed = batch.packed
        packed.balance_scale = torch.tensor(SCALE)
        weights, _ = router(mine, packed)
        (weights * 0.0).sum().backward()

        theirs, weight = hidden.clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
        expected = load_balancing_loss_func((theirs @ weight.t(),), moe.num_experts, moe.experts_per_token)
        (expected * SCALE).backward()
        sums = router.balance.taken(device.current())
        torch.distributed.all_reduce(sums)
        load = load_of(sums[None])
        assert load is not None and load.loss is not None
        tokens = (theirs @ weight.t()).topk(moe.experts_per_token).indices.flatten().bincount(minlength=moe.num_experts)
        torch.testing.assert_close(load.loss, float(expected), rtol=1e-5, atol=0)
        torch.testing.assert_close(load.worst, float(tokens.max() / tokens.float().mean()), rtol=1e-6, atol=0)
        wanted = torch.zeros_like(padded)
        wanted[here] = theirs.grad[batch.tokens[0][here]]  # type: ignore[index]
        torch.testing.assert_close(mine.grad, wanted.chunk(tp if sp else 1)[rank], rtol=1e-4, atol=1e-8)
        of_weight = router.weight.grad
        if sp or cp > 1:
            group = (
                parallel_state.get_tensor_and_context_parallel_group() if sp else parallel_state.get_context_parallel_group()
            )
            torch.distributed.all_reduce(of_weight, group=group)
        torch.testing.assert_close(of_weight, weight.grad, rtol=1e-4, atol=1e-8)
        print("equal", flush=True)


if __name__ == "__main__":
    main()
