"""The training engine: model, gradient buffers, optimizer and schedule of megatron-core, and one step of them."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron.sft.model.config import DTYPES, transformer_config
from megatron.sft.model.experts.balance import ExpertLoad, load_of, routers_of
from megatron.sft.model.gpt import HeadResult, SFTModel, build_model
from megatron.sft.model.inputs import MicroBatch
from megatron.sft.model.pipeline import run_schedule
from megatron.sft.planning.fitting.memory_fit import gpu_memory, memory_settings
from megatron.sft.planning.fitting.recomputing import recompute_words, with_cheapest_recompute
from megatron.sft.planning.memory import GIB, MemorySettings
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.runtime import device, ranks, watchdog
from megatron.sft.training.loss_sums import NUM_PAIR_SUMS, LossSum
from megatron.sft.training.optimizer import build_optimizer, clip_in_place, wrap_model
from megatron.sft.training.preferences import bound, objective_of


@dataclass(frozen=True)
class StepResult:
    """What a training step gives: the loss to reduce, the gradient norm before clipping, the learning rate used.

    applied: whether the weights took the step. They do not where the gradient is not finite, which every rank finds alike,
    nor where `overflow` says that fp16's loss scale was too large and was lowered; moments and the optimizer's count of
    steps then stay as they were too.
    """

    loss: LossSum
    grad_norm: float
    lr: float
    applied: bool = True
    overflow: bool = False


class _NotFiniteError(Exception):
    """The gradient norm of all processes is not finite."""


class Engine:
    """The model of a plan on this process, with its optimizer. `parallel` groups must exist."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.objective = objective_of(plan.options)
        self.num_mixtures = sum(layer.experts for layer in plan.architecture.layers)
        # Kept in checkpoints: steps skipped because of numbers that are not finite, and because of fp16's loss scale.
        self.counters = {"skipped_steps": 0, "overflows": 0}
        options = plan.options
        dtype = DTYPES[options.precision]
        memory = memory_of(plan)
        if options.recompute == "auto" and (gpu_bytes := gpu_memory(options)[0]):
            words = recompute_words(memory)
            ranks.print_rank_0(f"RECOMPUTE=auto: {words}, the cheapest that is estimated to fit {gpu_bytes / GIB:.0f} GiB")
        recompute = memory.recompute, memory.recompute_layers
        config = transformer_config(plan.architecture, plan.layout, options.precision, options.fp8_recipe, *recompute)
        # One chunk on each pipeline stage, or several that are interleaved.
        self.models = []
        for chunk in range(plan.layout.virtual_pipeline):
            module: torch.nn.Module = build_model(plan.architecture, plan.layout, config, chunk, plan.trained)
            if dtype != torch.float32:
                module = Float16Module(config, module)
            # Other chunks compute while the gradients of a later one are summed, so that it needs no buckets.
            self.models.append(wrap_model(config, module, options, plan.data_parallel, disable_bucketing=chunk > 0))
        self.optimizer = build_optimizer(options, dtype, self.models)
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
        self.optimizer.get_grad_norm = self._checked_grad_norm
        config.finalize_model_grads_func = _finalize_gradients
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = [model.no_sync for model in self.models] if len(self.models) > 1 else self.models[0].no_sync

    @property
    def chunks(self) -> list[SFTModel]:
        """The model chunks of this process without their wrappers."""
        modules = [model.module for model in self.models]
        return [module.module if isinstance(module, Float16Module) else module for module in modules]

    def train_step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Forward and backward of this rank's micro-batches, then one optimizer step."""
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        # The schedule counts steps from 1, so that the last one runs at MIN_LR.
        self.schedule.step(1)
        # Gradients are divided where backward starts, which saves a pass over all of them at the end.
        counts = torch.stack([_counts(batch) for batch in batches]).sum(dim=0)
        torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        count, chosen_tokens, num_batches = counts.clamp(min=1)
        scale = 1.0 / count.float()
        balance = None
        if self.plan.options.moe_aux_loss:
            # The mean over the micro-batches of all processes, and over the layers.
            balance = self.plan.options.moe_aux_loss / (num_batches * self.num_mixtures).float()
        scaled = [
            replace(batch, gradient_scale=scale, packed=replace(batch.packed, balance_scale=balance)) for batch in batches
        ]
        loss = self._run(scaled, forward_only=False, sft_scale=count.double() / chosen_tokens)
        watchdog.enter("optimizer")
        lr = float(get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0)
        try:
            applied, grad_norm, _ = self.optimizer.step()
        except _NotFiniteError as error:
            return StepResult(loss, float(error.args[0]), lr, applied=False)
        if applied:
            return StepResult(loss, float(grad_norm), lr)
        # A loss scale of 1 or less is not what makes a gradient overflow.
        overflow = float(self.optimizer.get_loss_scale()) > 1.0
        return StepResult(loss, math.inf, lr, applied=False, overflow=overflow)

    def expert_load(self) -> ExpertLoad | None:
        """How evenly tokens went to experts since the last call, over all processes; None without experts.

        Every rank must call it. Waits for the device.
        """
        moe = self.plan.architecture.moe
        if moe is None:
            return None
        place = device.current()
        sums = torch.zeros(self.plan.architecture.num_layers, moe.num_experts + 2, dtype=torch.float64, device=place)
        for layer, balance in routers_of(self.models):
            sums[layer] += balance.taken(place)
        torch.distributed.all_reduce(sums)
        return load_of(sums.cpu())

    def _checked_grad_norm(self) -> float:
        """megatron-core calls this before it clips and before anything is changed.

        The norm is on the CPU already, on every rank, so that looking at it costs no wait for the device.
        """
        if self.plan.options.optimizer_precision != "fp32" or self.plan.options.optimizer_offload:
            norm = clip_in_place(self.optimizer, self.plan.options.clip_grad)
        else:
            norm = float(type(self.optimizer).get_grad_norm(self.optimizer))
        if not math.isfinite(norm):
            raise _NotFiniteError(norm)
        return norm

    def has_finite_gradients(self, batch: MicroBatch) -> bool:
        """Whether one micro-batch gives this process finite gradients, without summing them over data-parallel ranks.

        Every rank of a model-parallel group must call it with the same micro-batch, and every data-parallel copy equally often.
        """
        config = self.models[0].config
        # Interleaved chunks take as many micro-batches at a time as there are stages.
        batches = [batch] * (self.plan.layout.pipeline_parallel if len(self.models) > 1 else 1)
        before = config.no_sync_func, config.finalize_model_grads_func
        config.no_sync_func = config.finalize_model_grads_func = None
        try:
            with self.gathered_parameters(), contextlib.ExitStack() as unsummed:
                for model in self.models:
                    model.train()  # or nothing would be recomputed
                    model.zero_grad_buffer()  # also re-enables the reduction of gradients
                    unsummed.enter_context(model.no_sync())
                self._run(batches, forward_only=False)
        finally:
            config.no_sync_func, config.finalize_model_grads_func = before
        buffers = [buffer for model in self.models for buffer in [*model.buffers, *model.expert_parallel_buffers]]
        # Piece by piece: a comparison makes copies of what it compares.
        pieces = (piece for buffer in buffers for piece in buffer.grad_data.split(1 << 26))
        return all(bool(torch.isfinite(piece).all()) for piece in pieces)

    def evaluate(self, batches: Sequence[MicroBatch]) -> LossSum:
        """The loss of this rank's micro-batches without training on them."""
        for model in self.models:
            model.eval()
        with self.gathered_parameters(), torch.no_grad():
            return self._run(batches, forward_only=True)

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """While open, parameters and the optimizer's state are up to date: what the next forward pass would wait for has been
        done, all-gathers and the CPU's step of OPTIMIZER_OFFLOAD."""
        for model in self.models:
            model.disable_forward_pre_hook()
        try:
            yield
        finally:
            for model in self.models:
                model.enable_forward_pre_hook()

    def _run(self, batches: Sequence[MicroBatch], forward_only: bool, sft_scale: Tensor | None = None) -> LossSum:
        """sft_scale: as in `PairObjective.weigh`."""
        objective = self.objective
        if self.plan.options.objective != "sft":
            batches = [bound(batch, self.plan.options, objective, sft_scale) for batch in batches]
        outputs = run_schedule(self.models, batches, _forward_step, forward_only)
        reports = [output["loss"] for output in outputs] if parallel_state.get_tensor_model_parallel_rank() == 0 else []
        size = 3 + 2 * batches[0].num_sources + (NUM_PAIR_SUMS if objective else 0)
        zero = torch.zeros(size, dtype=torch.float64, device=batches[0].tokens.device)
        sums = torch.stack([zero, *reports]).sum(dim=0)
        return LossSum(sums, objective is not None, objective.sft_weight if objective else 0.0)


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    watchdog.touch()
    return model(batch=batch), partial(_report_loss, batch)


def _report_loss(batch: MicroBatch, result: HeadResult) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    summed_loss = result[0]
    for_gradient = summed_loss if batch.gradient_scale is None else summed_loss * batch.gradient_scale
    return for_gradient, batch.loss_count.to(torch.int), {"loss": _report(batch, *result)}


def _counts(batch: MicroBatch) -> Tensor:
    """[3] int64, this rank's part of what a step's losses are divided by: the loss's count, tokens of chosen answers, and
    micro-batches, which the first context-parallel rank counts."""
    chosen = torch.zeros_like(batch.loss_count) if batch.pairs is None else batch.pairs.num_targets[0::2].sum()
    counts = not batch.is_blank and parallel_state.get_context_parallel_rank() == 0
    return torch.stack([batch.loss_count, chosen, torch.full_like(batch.loss_count, counts)])


def _report(batch: MicroBatch, summed_loss: Tensor, token_losses: Tensor, report: Tensor | None) -> Tensor:
    """The `LossSum.values` of one micro-batch; report: what `weigh` of its objective gave."""
    total = summed_loss.detach().double() if report is None else report[0]
    counts = torch.stack([batch.loss_count, torch.full_like(batch.loss_count, len(batch.targets.ids))]).double()
    of_pairs = [] if report is None else [report[1:]]
    return torch.cat([total[None], counts, _by_source(batch, token_losses), *of_pairs])


def _by_source(batch: MicroBatch, token_losses: Tensor) -> Tensor:
    """[2 * sources] float64: summed loss and number of trained tokens, source after source."""
    sums = torch.zeros(batch.num_sources, 2, dtype=torch.float64, device=token_losses.device)
    if batch.sources is not None:
        sums.index_add_(0, batch.sources, torch.stack([token_losses, torch.ones_like(token_losses)], dim=1).double())
    return sums.flatten()


def _finalize_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    # `num_tokens` would have megatron-core divide all gradients by it, which the loss has done.
    finalize_model_grads(model, None, **options)


def memory_of(plan: RunPlan) -> MemorySettings:
    """RECOMPUTE=auto replaced by the cheapest recomputation that is estimated to fit this GPU, by none on a CPU."""
    options = plan.options
    settings = memory_settings(options, plan.seq_length, plan.data_parallel, plan.trained)
    if settings.recompute != "auto":
        return settings
    gpu_bytes, _ = gpu_memory(options)
    if not gpu_bytes:
        return replace(settings, recompute="none")
    return with_cheapest_recompute(plan.architecture, plan.layout, plan.data_parallel, settings, gpu_bytes)
