"""The training engine: model, gradient buffers, optimizer and schedule of megatron-core, and one step of them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron.sft.batches import MicroBatch
from megatron.sft.model import SFTModel, build_model, transformer_config
from megatron.sft.run_plan import RunPlan

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class LossSum:
    """A loss to be averaged: float64 [3] on the device, summed loss, its count, trained tokens; zeros off the last stage."""

    values: Tensor

    def reduce(self) -> tuple[float, int]:
        """Mean loss and the number of trained tokens over all processes. Waits for the device; every rank must call it."""
        values = self.values.clone()
        torch.distributed.all_reduce(values)
        total, count, tokens = values.tolist()
        return total / max(count, 1.0), int(tokens)


@dataclass(frozen=True)
class StepResult:
    """What a training step gives: the loss to reduce, the gradient norm before clipping, the learning rate used."""

    loss: LossSum
    grad_norm: float
    lr: float


class Engine:
    """The model of a plan on this process, with its optimizer. `parallel` groups must exist."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        options = plan.options
        dtype = DTYPES[options.precision]
        config = transformer_config(plan.shape, plan.layout, dtype, **_recompute(options.recompute))
        module: torch.nn.Module = build_model(plan.shape, plan.layout, config)
        if dtype != torch.float32:
            module = Float16Module(config, module)
        # One bucket a 40 million parameters or more, as megatron-core's own training loop chooses.
        bucket_size = max(40_000_000, 1_000_000 * plan.data_parallel)
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                use_distributed_optimizer=True,
                bucket_size=bucket_size,
            ),
            module,
        )
        _count_padding(self.model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                min_lr=options.min_lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.adam_beta1,
                adam_beta2=options.adam_beta2,
                adam_eps=options.adam_eps,
                clip_grad=options.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=True,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=plan.warmup_iters,
            lr_decay_steps=plan.train_iters,
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=plan.train_iters,
            wd_incr_style="constant",
            wsd_decay_steps=plan.wsd_decay_iters,
            lr_wsd_decay_style=options.lr_wsd_decay_style,
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.model.no_sync

    @property
    def module(self) -> SFTModel:
        """The model without its wrappers."""
        module: Any = self.model.module
        module = module.module if isinstance(module, Float16Module) else module
        assert isinstance(module, SFTModel)
        return module

    def train_step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Forward and backward of this rank's micro-batches, then one optimizer step."""
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        # The schedule counts steps from 1, so that the last one runs at MIN_LR.
        self.schedule.step(1)
        loss = self._run(batches, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(loss, float(grad_norm), float(self.optimizer.param_groups[0]["lr"]))

    def evaluate(self, batches: Sequence[MicroBatch]) -> LossSum:
        """The loss of this rank's micro-batches without training on them."""
        self.model.eval()
        with self.gathered_parameters(), torch.no_grad():
            return self._run(batches, forward_only=True)

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """While open, every parameter is up to date: the gather that the next forward pass would do has been done."""
        self.model.disable_forward_pre_hook()
        try:
            yield
        finally:
            self.model.enable_forward_pre_hook()

    def _run(self, batches: Sequence[MicroBatch], forward_only: bool) -> LossSum:
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            # Used for the shapes between stages only where rows have one length.
            seq_length=self.plan.seq_length,
            micro_batch_size=self.plan.options.micro_batch_size,
            forward_only=forward_only,
        )
        reports = [output["loss"] for output in outputs] if parallel_state.get_tensor_model_parallel_rank() == 0 else []
        zero = torch.zeros(3, dtype=torch.float64, device=batches[0].tokens.device)
        return LossSum(torch.stack([zero, *reports]).sum(dim=0))


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    return model(batch=batch), partial(_report_loss, batch)


def _report_loss(batch: MicroBatch, summed_loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # megatron-core sums the losses and counts of all micro-batches and ranks and divides the gradient once.
    counts = torch.stack([batch.loss_count, torch.full_like(batch.loss_count, len(batch.targets.ids))]).double()
    report = torch.cat([summed_loss.detach().double()[None], counts])
    return summed_loss, batch.loss_count.to(torch.int), {"loss": report}


def _count_padding(model: DistributedDataParallel) -> None:
    """Have the optimizer state saved with the padding between buckets, which its parameters' positions count.

    megatron-core 0.16 leaves the padding out of the gathered state and then reads every parameter behind it from the wrong
    place: a checkpoint of a model with several buckets would hold shifted weights and moments.
    """
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _recompute(word: str) -> dict[str, Any]:
    if word == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if word == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
