"""Compares converted models with transformers in one parallel layout: logits, and the gradients of one training step.

torchrun … conversion_worker.py TP PP EP SP FOLDER CHECKPOINTS NAME...: models of FOLDER, whose checkpoints have their names. A
line gives the largest difference of logits, the largest relative one of a parameter's gradient, and how much the logits of a
conversation change when its neighbors in the row do.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.sft.checkpoint.folder import open_checkpoint
from megatron.sft.compare_logits import megatron_logits, transformers_logits
from megatron.sft.data.tokenized import Row
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.registry import module_names
from megatron.sft.families.rules import tensor_parallel_part
from megatron.sft.hf.folder import HFFolder
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.runtime import device

# Below and above the windows and the original positions of the tiny models.
LENGTHS = (40, 30, 61)


def main() -> None:
    tp, pp, ep, sp = map(int, sys.argv[1:5])
    layout = Layout(tp, pp, sequence_parallel=bool(sp), expert_parallel=ep)
    with process_groups.parallel(layout):
        assert layout.model_size * max(1, ep // tp) == torch.distributed.get_world_size()
        for name in sys.argv[7:]:
            folder, checkpoint = Path(sys.argv[5]) / name, Path(sys.argv[6]) / name
            source = HFFolder(folder)
            if ep > 1 and source.architecture.moe is None:
                continue
            check_layout(layout, source.architecture)
            difference = logits_difference(checkpoint, source, layout)
            worst, parameter = gradient_difference(checkpoint, source, layout)
            leaked = influence(checkpoint, source, layout)
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                print(f"result {name} {difference:.3g} {worst:.3g} {leaked:.3g} {parameter}", flush=True)


def conversations(source: HFFolder) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, source.architecture.vocab_size, size=length) for length in LENGTHS]


def logits_difference(checkpoint: Path, source: HFFolder, layout: Layout) -> float:
    """The largest of all processes."""
    ours = megatron_logits(open_checkpoint(checkpoint), source, layout, conversations(source))
    difference = 0.0
    if ours is not None:
        difference = float((ours - transformers_logits(source, conversations(source))).abs().max())
    return largest(difference)


def influence(checkpoint: Path, source: HFFolder, layout: Layout) -> float:
    """The largest change of a conversation's logits when the conversations before and after it in the row are others."""
    row = conversations(source)
    others = [(part + 1) % source.architecture.vocab_size for part in row]
    middle = slice(len(row[0]), len(row[0]) + len(row[1]))
    found = []
    for before, after in ((row[0], row[2]), (others[0], others[2])):
        logits = megatron_logits(open_checkpoint(checkpoint), source, layout, [before, row[1], after])
        found.append(None if logits is None else logits[middle])
    one, other = found
    return largest(0.0 if one is None or other is None else float((one - other).abs().max()))


def largest(value: float) -> float:
    result = torch.tensor(value if value == value else float("inf"))
    torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MAX)
    return float(result)


def gradient_difference(checkpoint: Path, source: HFFolder, layout: Layout) -> tuple[float, str]:
    """The largest relative difference of a parameter's gradient over all processes, and this process's worst parameter."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron.sft.checkpoint.model_shards import load_weights
    from megatron.sft.model.config import transformer_config
    from megatron.sft.model.gpt import build_model
    from megatron.sft.model.live_weights import live_weights
    from megatron.sft.training.batches import make_micro_batch

    architecture = source.architecture
    config = transformer_config(architecture, layout)
    model = build_model(architecture, layout, config)
    load_weights(open_checkpoint(checkpoint), [model], layout)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    config.finalize_model_grads_func = finalize_model_grads
    row = packed_row(source)
    batch = make_micro_batch([row], layout.tensor_parallel, "token", device.current())

    def loss(output: tuple[torch.Tensor, torch.Tensor, None]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        summed, *_ = output
        return summed, batch.loss_count.to(torch.int), {"loss": summed.detach()}

    def step(batches: Iterator[Any], stage: Any) -> tuple[torch.Tensor, Any]:
        return stage(batch=next(batches)), partial(loss)

    wrapped.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=[wrapped],
        num_microbatches=1,
        seq_length=batch.tokens.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )
    expected = transformers_gradients(source, row)
    worst, worst_name = 0.0, "-"
    for weight in live_weights(model, architecture, layout):
        entry, name = weight.entry, weight.entry.megatron
        if entry.is_buffer:
            assert not hasattr(weight.parameter, "main_grad"), name
            continue
        whole = entry.rule.to_megatron(architecture, *(expected[hf] for hf in entry.hf))
        if "embedding" in name or "output_layer" in name:
            whole = torch.cat([whole, whole.new_zeros(layout.padded_vocab_size(architecture) - len(whole), whole.shape[1])])
        rank, size = parallel_state.get_tensor_model_parallel_rank(), layout.tensor_parallel
        if entry.expert is not None:
            rank, size = parallel_state.get_expert_tensor_parallel_rank(), layout.expert_tensor_parallel
        theirs = tensor_parallel_part(entry.rule, whole, rank, size)
        ours = weight.parameter.main_grad
        if ours.shape != weight.values.shape:  # of several experts
            ours = ours[(weight.values.data_ptr() - weight.parameter.data_ptr()) // weight.values.nbytes]
        # Of a typical part: two numbers of a rank can be as good as zero next to the whole parameter's gradient.
        typical = torch.maximum(theirs.norm(), whole.norm() / size**0.5)
        difference = float((ours - theirs).norm() / typical.clamp(min=1e-6))
        if difference > worst:
            worst, worst_name = difference, name
    return largest(worst), worst_name


def packed_row(source: HFFolder) -> Row:
    parts = conversations(source)
    trained = np.concatenate([np.arange(len(part)) > len(part) // 3 for part in parts])
    return Row(np.concatenate(parts), trained, np.array([len(part) for part in parts]))


def transformers_gradients(source: HFFolder, row: Row) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over the trained tokens, by the names of the tensors on disk."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    start, total = 0, torch.zeros(())
    for length in row.conversation_lengths:
        ids = torch.from_numpy(row.tokens[start : start + length])
        trained = torch.from_numpy(row.trained[start : start + length])
        logits = model(ids[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        total = total + losses[trained[1:]].sum()
        start += int(length)
    (total / int(row.trained.sum())).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return on_disk_names(gradients, source.architecture)


def on_disk_names(gradients: dict[str, torch.Tensor], architecture: Architecture) -> dict[str, torch.Tensor]:
    """transformers 5 keeps all experts of a layer in one parameter; in the family's table they are apart."""
    names = module_names(architecture.family)
    parts = {"gate_up_proj": ("expert_gate", "expert_up"), "down_proj": ("expert_down",)}
    result = {}
    for name, gradient in gradients.items():
        module, _, kind = name.rpartition(".")
        if not module.endswith(".experts"):
            result[name] = gradient
        elif names["expert_fused"]:
            result |= {f"{module}.{expert}.{kind}": each for expert, each in enumerate(gradient)}
        else:
            for expert, each in enumerate(gradient):
                for part, half in zip(parts[kind], each.chunk(len(parts[kind])), strict=True):
                    result[f"{module}.{expert}.{names[part]}.weight"] = half
    if names["fused_correction_bias"]:
        result = {name.replace(names["fused_correction_bias"], names["correction_bias"][:-3]): g for name, g in result.items()}
    return {name.replace(".mlp.", f".{names['block']}."): gradient for name, gradient in result.items()}


if __name__ == "__main__":
    main()
