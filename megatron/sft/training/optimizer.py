"""AdamW over megatron-core's distributed optimizer, and the gradient buffers that it reads."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError


def wrap_model(
    config: TransformerConfig, module: MegatronModule, options: TrainOptions, data_parallel: int, **chunk: Any
) -> DistributedDataParallel:
    """The module with buffers that its gradients are summed in, reduced over data-parallel ranks while backward runs."""
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=options.optimizer_precision == "fp32",
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
            # Parameters a bucket: at least 40 million, as megatron-core's own training loop chooses.
            bucket_size=max(40_000_000, 1_000_000 * data_parallel),
        ),
        module,
        **chunk,
    )
    _count_padding(model)
    return model


def build_optimizer(
    options: TrainOptions, dtype: torch.dtype, models: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    """The optimizer of these model chunks. OPTIMIZER_PRECISION=bf16 keeps gradients and moments in 16 bits."""
    fields: dict[str, Any] = {}
    if options.optimizer_precision == "bf16":
        if not _has_fused_adam() or dtype != torch.bfloat16:
            raise UserError(
                "OPTIMIZER_PRECISION=bf16 needs PRECISION=bf16 or fp8, a GPU and Transformer Engine's optimizer: take fp32"
            )
        half = torch.bfloat16
        fields |= {"use_precision_aware_optimizer": True, "main_grads_dtype": half}
        fields |= {"exp_avg_dtype": half, "exp_avg_sq_dtype": half}
    if options.optimizer_offload:
        if not _has_fused_adam() or options.optimizer_precision == "bf16":
            raise UserError(
                "OPTIMIZER_OFFLOAD=1 needs a GPU, Transformer Engine's optimizer and OPTIMIZER_PRECISION=fp32: set it to 0"
            )
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": 1.0,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
        fields |= {"use_precision_aware_optimizer": True}
    optimizer = get_megatron_optimizer(
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
            fp16=dtype == torch.float16,
            initial_loss_scale=options.initial_loss_scale,
            loss_scale_window=options.loss_scale_window,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
            **fields,
        ),
        list(models),
        use_gloo_process_groups=False,
    )
    if device.has_gpu():
        for group in optimizer.param_groups:
            if "fused" in group:
                # torch's own AdamW would otherwise make several passes over the state.
                group["fused"], group["foreach"] = True, False
    return optimizer


def _has_fused_adam() -> bool:
    if not device.has_gpu():
        return False
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    return not USING_PYTORCH_OPTIMIZER


def _count_padding(model: DistributedDataParallel) -> None:
    """Make the optimizer state be saved with the padding between buckets, which the offsets of its parameters include.

    megatron-core 0.16 drops the padding from the gathered state and then reads every parameter after it from the wrong
    offset: a checkpoint of a model with several buckets would hold shifted weights and moments.
    """
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
