"""megatron-core's TransformerConfig for an architecture, a layout and a precision; built here and nowhere else."""

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.sft.families.architecture import Architecture
from megatron.sft.model.fused_wgrad import use_in_linear_layers
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "fp32": torch.float32}
# 8-bit matrix products of Hopper need sizes that are multiples of this.
_FP8_BLOCK = 16


def has_transformer_engine() -> bool:
    """True if this process uses Transformer Engine's layers: it has a GPU and megatron-core found the package.

    MEGATRON_SFT_TE=0 in the environment does without it, to compare.
    """
    if not device.has_gpu() or os.environ.get("MEGATRON_SFT_TE") == "0":
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def describe_kernels(precision: str) -> str:
    """What this process computes with, for the log, and what would be faster."""
    if not device.has_gpu():
        return "torch on the CPU"
    own = "Triton kernels for norms, SwiGLU, rotary positions and loss"
    if has_transformer_engine():
        import transformer_engine

        attention = "torch's attention, conversation by conversation" if precision == "fp32" else "its packed attention"
        return f"Transformer Engine {getattr(transformer_engine, '__version__', '')}: linear layers, {attention}, AdamW; {own}"
    attention = "scaled_dot_product_attention, conversation by conversation" if precision == "fp32" else "varlen_attn"
    return (
        f"torch {torch.__version__}: linear layers, {attention}, fused AdamW; {own}. "
        "Transformer Engine is not installed: with it bf16 is faster, and fp8 possible"
    )


def transformer_config(
    architecture: Architecture,
    layout: Layout,
    precision: str = "fp32",
    fp8_recipe: str = "tensorwise",
    recompute: str = "none",
    recompute_layers: int = 0,
) -> TransformerConfig:
    """megatron-core's configuration of this architecture in this layout.

    precision, fp8_recipe, recompute: words of PRECISION, FP8_RECIPE, RECOMPUTE (`auto` decided). recompute_layers: of each
    pipeline stage, recomputed whole. A layout or a precision that the model or the machine does not allow is a `UserError`.
    """
    check_layout(layout, architecture)
    params_dtype = DTYPES[precision]
    accumulate = device.has_gpu() and not has_transformer_engine()
    if accumulate:
        use_in_linear_layers()
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        # It sums gradients of these norms over TP, which is wrong where they are split (`ProjectionNorm`).
        qk_layernorm=architecture.query_key_norm in ("head", "rotated head"),
        layernorm_zero_centered_gamma=architecture.zero_centered_norm,
        attention_output_gate=architecture.attention_gate,
        softmax_scale=architecture.attention_scale,
        # Layers of more than one kind lie in a checkpoint under their numbers.
        hetereogenous_dist_checkpoint=architecture.layers_differ,
        **_window_fields(architecture),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        calculate_per_token_loss=True,
        use_cpu_initialization=not device.has_gpu(),
        perform_initialization=False,
        # Transformer Engine's layers have another switch for it (see build_model).
        gradient_accumulation_fusion=accumulate,
        # megatron-core's fusions need Apex, Transformer Engine or torch.compile; the decoder layer here has its own kernels.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        **_parallel_fields(architecture, layout, params_dtype),
        **_moe_fields(architecture, layout),
        **_recompute_fields(recompute, recompute_layers),
        **(_fp8_fields(fp8_recipe, architecture, layout) if precision == "fp8" else {}),
    )


def _window_fields(architecture: Architecture) -> dict[str, Any]:
    """For Transformer Engine's attention; `PackedAttention` gets its layer's window from the layer's spec."""
    if not architecture.windows:
        return {}
    # megatron-core counts the tokens before the own one.
    fields: dict[str, Any] = {"window_size": (architecture.windows[0] - 1, 0)}
    if any(layer.window is None for layer in architecture.layers):
        fields["window_attn_skip_freq"] = [int(layer.window is not None) for layer in architecture.layers]
    return fields


def _parallel_fields(architecture: Architecture, layout: Layout, params_dtype: torch.dtype) -> dict[str, Any]:
    stage_layers = layout.stage_layers(architecture)
    uneven = len(set(stage_layers)) > 1
    interleaved = layout.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "context_parallel_size": layout.context_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "num_layers_in_first_pipeline_stage": stage_layers[0] if uneven else None,
        "num_layers_in_last_pipeline_stage": stage_layers[-1] if uneven else None,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if interleaved else None,
        # Between two stages only megatron-core's single transfers keep the two directions of interleaved chunks apart.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": False,
        "pipeline_dtype": params_dtype,
        # Rows differ in length (see `pipeline.RowPipeline`).
        "variable_seq_lengths": layout.pipeline_parallel > 1,
        # Of dense models too: megatron-core refuses rows of different lengths with its default.
        "moe_token_dispatcher_type": "alltoall",
        # megatron-core refuses them with its default dispatcher, also in a model without experts.
    }


def _moe_fields(architecture: Architecture, layout: Layout) -> dict[str, Any]:
    moe = architecture.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.experts_per_token,
        # The router here does not read it; megatron-core refuses its own default where a token goes to one expert.
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
    }


def _recompute_fields(word: str, num_layers: int) -> dict[str, Any]:
    """`selective` recomputes norms, activation functions (DecoderLayer) and heads (LatentAttention); `full`, and num_layers,
    whole layers.
    """
    if word == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if num_layers:
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": num_layers}
    if word == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": []}
    return {}


def _fp8_fields(recipe: str, architecture: Architecture, layout: Layout) -> dict[str, Any]:
    """The layers' matrix products in 8 bits, on bf16 weights.

    `tensorwise` scales every tensor by its current largest value; `delayed` by the largest of the last 16 steps; `blockwise`
    every 128 values of an activation, and every 128 x 128 of a weight, by their own.
    """
    if not has_transformer_engine():
        raise UserError("PRECISION=fp8 needs a GPU and Transformer Engine (an nvcr PyTorch container has it): take bf16")
    import transformer_engine

    found = Machine(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        str(torch.version.cuda),
        getattr(transformer_engine, "__version__", "0"),
    )
    if refusal := fp8_refusal(recipe, found):
        raise UserError(refusal)
    sizes = {
        "hidden size": architecture.hidden_size,
        "MLP width of a tensor-parallel process": architecture.ffn_hidden_size // layout.tensor_parallel,
        "query width of a tensor-parallel process": architecture.num_heads * architecture.head_dim // layout.tensor_parallel,
    }
    if latent := architecture.latent:
        sizes |= {"vector for keys and values": latent.kv_rank, "vector for queries": latent.query_rank or 0}
        sizes |= {"value width": architecture.num_heads * latent.value_dim}
    if moe := architecture.moe:
        sizes["experts' width on a process"] = moe.ffn_hidden_size // layout.expert_tensor_parallel
        sizes["shared experts' width"] = moe.shared_width
    for name, size in sizes.items():
        if size % _FP8_BLOCK:
            raise UserError(
                f"PRECISION=fp8 needs sizes that are multiples of {_FP8_BLOCK}, the model's {name} is {size}: take bf16"
            )
    history = {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"} if recipe == "delayed" else {}
    # Gradients need the range of e5m2, unless every block has its own scale.
    return {"fp8": "e4m3" if recipe == "blockwise" else "hybrid", "fp8_recipe": recipe, **history}


@dataclass(frozen=True)
class Machine:
    """What decides whether 8-bit products are possible: versions as their libraries write them."""

    gpu: str
    capability: tuple[int, int]
    cuda: str
    transformer_engine: str


def fp8_refusal(recipe: str, found: Machine) -> str:
    """Why a machine cannot compute a recipe, in the words of a `UserError`, or nothing. The limits are Transformer Engine's."""
    needed = (9, 0) if recipe == "blockwise" else (8, 9)
    if found.capability < needed:
        instead = "bf16" if found.capability < (8, 9) else "FP8_RECIPE=tensorwise"
        return (
            f"PRECISION=fp8 with FP8_RECIPE={recipe} needs a GPU of compute capability {needed[0]}.{needed[1]}, "
            f"{found.gpu} has {found.capability[0]}.{found.capability[1]}: take {instead}"
        )
    if recipe != "blockwise":
        return ""
    for name, version, least in (("CUDA", found.cuda, (12, 9)), ("Transformer Engine", found.transformer_engine, (2, 3))):
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            needs = f"{name} {least[0]}.{least[1]} or newer, here is {version}"
            return f"FP8_RECIPE=blockwise needs {needs}: take FP8_RECIPE=tensorwise"
    return ""
