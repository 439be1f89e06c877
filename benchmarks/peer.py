"""The benchmark's peer: a transformers model with Liger's kernels on packed rows, as a careful user would train it."""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peak_bytes
from benchmarks.models import cut_config
from benchmarks.rows import BenchmarkRows
from megatron.sft.runtime.errors import UserError

_ATTENTION = "packed_varlen"
_WITH_DELTA_NETS = {"qwen3_5_text"}


def measure_steps(arguments: argparse.Namespace, rows: BenchmarkRows) -> tuple[list[float], list[float], list[float]]:
    """Seconds and losses of the timed steps, and `peak_bytes`. A step is forward and backward of all micro-batches,
    clipping and AdamW.
    """
    model = _model(arguments)
    if arguments.peer_recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if arguments.lora_rank:
        model = _with_adapters(model, arguments.lora_rank, in_float32=arguments.stack == "peer")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds, losses = [], []
    size = arguments.micro_batches
    for step in range(arguments.warm_up + arguments.steps):
        indices = rows.used(step, 1, size)
        batches = [_batch(rows, index) for index in indices]
        num_trained = sum(rows.counts[index].trained for index in indices)
        torch.cuda.synchronize()
        started = time.perf_counter()
        total = torch.zeros((), device="cuda")
        for batch in batches:
            loss = model(**batch, num_items_in_batch=num_trained, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if step >= arguments.warm_up:
            seconds.append(time.perf_counter() - started)
            losses.append(float(total))
    return seconds, losses, peak_bytes()


def _model(arguments: argparse.Namespace) -> Any:
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(f"the peer needs Liger's kernels ({error}): pip install liger-kernel, or --against ''") from None
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _packed_attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    whole = AutoConfig.for_model(**cut_config(arguments))
    config = whole.get_text_config()
    config.tie_word_embeddings = whole.tie_word_embeddings
    config._attn_implementation = _ATTENTION
    is_mixture = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if is_mixture:
        config._experts_implementation = "grouped_mm"  # all experts in one product
    if config.model_type in _WITH_DELTA_NETS:
        _use_fla_convolution()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    torch.set_default_dtype(torch.float32)
    # Its own experts would take the place of the grouped product.
    options = {"swiglu": False} if is_mixture else {}
    _apply_liger_kernel_to_instance(model, **options)
    result: Any = model.train()
    return result


def _use_fla_convolution() -> None:
    """transformers takes the gated delta rule from flash-linear-attention, the convolution from a package without wheels."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    try:
        from fla.modules.causal_conv1d import causal_conv1d
    except ImportError as error:
        raise UserError(f"gated delta nets need a package ({error}): pip install 'flash-linear-attention>=0.6'") from None

    def convolved(inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **kwargs: Any) -> Tensor:
        """inputs [1, channels, t] to the same."""
        result, _ = causal_conv1d(
            inputs.transpose(1, 2), weight, bias, activation=activation, cu_seqlens=kwargs.get("cu_seq_lens_q")
        )
        return result.transpose(1, 2)

    modeling_qwen3_5.causal_conv1d_fn = convolved


def _with_adapters(model: Any, rank: int, in_float32: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=in_float32)


def _batch(rows: BenchmarkRows, index: int) -> dict[str, Tensor | int]:
    """One packed row [1, t] for transformers' padding-free path."""
    row = rows[index]
    tokens = torch.from_numpy(row.tokens).cuda()[None]
    cu_seqlens = torch.zeros(len(row.conversation_lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.from_numpy(row.conversation_lengths).cumsum(0)
    cu_seqlens = cu_seqlens.cuda()
    position_ids = torch.cat([torch.arange(int(size)) for size in row.conversation_lengths])[None].cuda()
    labels = torch.where(torch.from_numpy(row.trained).cuda()[None], tokens, -100)
    longest = int(row.conversation_lengths.max())
    return {
        "input_ids": tokens,
        "position_ids": position_ids,
        "labels": labels,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, heads, t, dim], key and value [1, kv heads, t, dim]; returns [1, t, heads, dim].

    With the layer's window, and gpt-oss's sinks, for which transformers has a kernel on the hub alone: ours. Values of another
    size, as latent attention has them, are padded: the kernel takes one size.
    """
    from megatron.sft.model.attention.flash_attention import attention_with_sinks, varlen_attention
    from megatron.sft.model.inputs import AttentionRuns

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    size = value.shape[-1]
    if size != key.shape[-1]:
        value = torch.nn.functional.pad(value, (0, key.shape[-1] - size))
    cu_seqlens, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    window = (kwargs["sliding_window"] - 1, 0) if kwargs.get("sliding_window") else (-1, 0)
    if kwargs.get("s_aux") is not None:
        runs = AttentionRuns([longest], [longest], cu_seqlens, cu_seqlens, None)
        return attention_with_sinks(query, key, value, kwargs["s_aux"], runs, scaling, window)[None], None
    context = varlen_attention(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scaling, window)
    return context[None, ..., :size], None
