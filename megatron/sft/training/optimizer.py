"""AdamW over megatron-core's distributed optimizer, and the gradient buffers that it reads."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.hooks import RemovableHandle

from megatron.sft.checkpoint.optimizer_state import inner_optimizers, shares
from megatron.sft.planning.first_checks import optimizer_problems
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError
from megatron.sft.training.optimizers.adamw import InPlaceAdamW
from megatron.sft.training.optimizers.adamw_8bit import EightBitAdamW
from megatron.sft.training.optimizers.offload import OffloadedAdamW, overlap


def wrap_model(
    config: TransformerConfig, module: MegatronModule, options: TrainOptions, data_parallel: int, **chunk: Any
) -> DistributedDataParallel:
    """The module with buffers that its gradients are summed in, reduced over data-parallel ranks while backward runs.

    Its parameters move into one buffer, and have no values until they are loaded.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            # megatron-core copies each into the buffer, next to which all of them would be in memory a second time.
            parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)
    return _ByLayer(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=options.optimizer_precision == "fp32",
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
            # Parameters a bucket: at least 40 million, as megatron-core's own training loop chooses.
            bucket_size=max(40_000_000, 1_000_000 * data_parallel),
            # Moments of 8 bits come in blocks, which no process's share then cuts.
            pad_buckets_for_high_nccl_busbw=options.optimizer_precision == "8bit",
        ),
        module,
        **chunk,
    )


class _ByLayer(DistributedDataParallel):
    """Waits for the weights of a whole layer before it: `DecoderLayer` uses weights of modules that it does not call."""

    _layers: Sequence[RemovableHandle] = ()

    def enable_forward_pre_hook(self) -> None:
        """Also of layers."""
        super().enable_forward_pre_hook()
        wait = self._make_forward_pre_hook()

        def before(layer: torch.nn.Module, *_: Any) -> None:
            for part in layer.modules():
                wait(part)

        layers = (module for module in self.module.modules() if isinstance(module, TransformerLayer))
        self._layers = [layer.register_forward_pre_hook(before) for layer in layers]

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Also of layers."""
        for handle in self._layers:
            handle.remove()
        super().disable_forward_pre_hook(param_sync)


def build_optimizer(options: TrainOptions, dtype: torch.dtype, models: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """The optimizer of these model chunks. OPTIMIZER_PRECISION=bf16 and 8bit keep gradients in 16 bits, moments in 16 or 8."""
    adamw = _own_adamw(options)
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=0.0 if adamw else options.clip_grad,  # ours clip while they read the gradients
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=options.initial_loss_scale,
        loss_scale_window=options.loss_scale_window,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    with _built_around(adamw, config) if adamw else contextlib.nullcontext():
        overrides = get_standard_config_overrides(config)
        if options.lora_plus != 1.0:
            # LoRA+ (Hayou et al., 2024): B learns faster than A.
            key = ParamKey(name="*.adapter.*_B")
            overrides[key] = ParamGroupOverride(
                max_lr=options.lr * options.lora_plus, min_lr=options.min_lr * options.lora_plus
            )
        optimizer = get_megatron_optimizer(config, list(models), overrides, use_gloo_process_groups=False)
    if adamw is EightBitAdamW:
        for share in shares(optimizer):
            share.optimizer.optimizer.starts[share.held] = share.start
    if adamw is OffloadedAdamW:
        for inner in inner_optimizers(optimizer):
            inner.optimizer.share = options.optimizer_offload
        overlap(models, optimizer)
        for inner in inner_optimizers(optimizer):
            inner.optimizer.check_memory()
    if device.has_gpu() and not adamw:
        for group in optimizer.param_groups:
            if "fused" in group:
                # torch's own AdamW would otherwise make several passes over the state.
                group["fused"], group["foreach"] = True, False
    return optimizer


def _own_adamw(options: TrainOptions) -> type[InPlaceAdamW] | None:
    """The class that steps this run's parameters, where it is not torch's or Transformer Engine's."""
    for problem in optimizer_problems(options):
        raise UserError(problem)
    if options.optimizer_offload:
        return OffloadedAdamW
    return {"fp32": None, "bf16": InPlaceAdamW, "8bit": EightBitAdamW}[options.optimizer_precision]


@contextlib.contextmanager
def _built_around(adamw: type[InPlaceAdamW], config: OptimizerConfig) -> Iterator[None]:
    """Make megatron-core build its distributed optimizer around `adamw` instead of Transformer Engine's AdamW.

    The fields are set after megatron-core has checked the configuration, which insists on Transformer Engine.
    """
    config.use_precision_aware_optimizer = True
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    in_place = adamw is not OffloadedAdamW
    config.store_param_remainders = in_place
    dtype = torch.bfloat16 if in_place else torch.float32
    config.main_grads_dtype = config.exp_avg_dtype = config.exp_avg_sq_dtype = dtype
    package: Any = megatron.core.optimizer
    replaced: list[tuple[Any, str, Any]] = [(package, "Adam", adamw), (package.distrib_optimizer, "Adam", adamw)]
    replaced += [(package, "USING_PYTORCH_OPTIMIZER", False), (package, "is_te_min_version", lambda version: False)]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def clip_in_place(optimizer: MegatronOptimizer, clip_grad: float) -> float:
    """The norm of all ranks' gradients, summed in float32; sets how much of them every `InPlaceAdamW` takes.

    Without Transformer Engine, megatron-core would sum in the dtype of the gradients. Every rank must call it.
    """
    total = torch.zeros((), dtype=torch.float32, device=device.current())
    inner = inner_optimizers(optimizer)
    for part in inner:
        gradients = _counted_gradients(part)
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        square = torch.stack(norms).square().sum() if norms else torch.zeros_like(total)
        torch.distributed.all_reduce(square, group=part.get_grad_stats_parallel_group())
        total += square
    norm = float(total.sqrt())
    scale = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad > 0 else 1.0
    for part in inner:
        if isinstance(part.optimizer, InPlaceAdamW):
            part.optimizer.grad_scale = scale
    return norm


def _counted_gradients(part: MegatronOptimizer) -> list[torch.Tensor]:
    """The gradients of this rank that no other rank counts. The method's name depends on megatron-core's version."""
    if hasattr(part, "get_main_grads_for_grad_norm"):  # 0.16
        return part.get_main_grads_for_grad_norm()
    return part.get_grads_for_grad_norm()
