"""The `torch` format: one `mp_rank_TT[_PPP]/model_optim_rng.pt` a process, the tree of classic Megatron-LM.

Each process saves and loads its own part, so a checkpoint can only be read at the TP and PP that it was written at.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from megatron.sft.errors import UserError
from megatron.sft.families.rules import Shape
from megatron.sft.layout import Layout
from megatron.sft.weights import checkpoint_name

FILE = "model_optim_rng.pt"

# Layers that are Transformer Engine's where classic Megatron-LM trains; it expects a state of theirs, empty without FP8.
_ENGINE_LAYERS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def rank_folder(layout: Layout) -> str:
    """`mp_rank_01`, or `mp_rank_01_002` where the pipeline has stages, for this process."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    if layout.pipeline_parallel == 1:
        return f"mp_rank_{tensor_rank:02d}"
    return f"mp_rank_{tensor_rank:02d}_{parallel_state.get_pipeline_model_parallel_rank():03d}"


def find_layout(folder: Path) -> Layout:
    """The TP and PP that the names of the rank folders tell."""
    ranks = [path.parent.name.removeprefix("mp_rank_").split("_") for path in folder.glob(f"mp_rank_*/{FILE}")]
    tensor_parallel = 1 + max(int(rank[0]) for rank in ranks)
    pipeline_parallel = 1 + max(int(rank[1]) if len(rank) > 1 else 0 for rank in ranks)
    if len(ranks) != tensor_parallel * pipeline_parallel:
        raise UserError(
            f"{folder} has {len(ranks)} rank folders, TP {tensor_parallel} x PP {pipeline_parallel} need more"
        )
    return Layout(tensor_parallel, pipeline_parallel)


def save(folder: Path, model: nn.Module, shape: Shape, layout: Layout, iteration: int) -> None:
    """Write this process's part of the model, with the arguments that Megatron-LM checks and `--use-checkpoint-args` reads."""
    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        state[checkpoint_name(name)] = parameter.detach().clone()
    for layer in {name.split(".")[2] for name in state if name.startswith("decoder.layers.")}:
        state.update({f"decoder.layers.{layer}.{module}._extra_state": None for module in _ENGINE_LAYERS})
    if parallel_state.is_pipeline_last_stage():
        state["decoder.final_layernorm._extra_state"] = None
        state["output_layer._extra_state"] = None
    content = {
        "args": _megatron_arguments(shape, layout, iteration),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
        "model": state,
    }
    path = folder / rank_folder(layout) / FILE
    path.parent.mkdir()
    torch.save(content, path)


def load(folder: Path, model: nn.Module, layout: Layout) -> None:
    """Fill this process's part of the model. Every parameter must be there with the right shape, and nothing else."""
    path = folder / rank_folder(layout) / FILE
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint was not written at this TP and PP") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or holds more than weights ({error}): convert the model again") from None
    state = {name: value for name, value in content["model"].items() if not name.endswith("_extra_state")}
    parameters = {checkpoint_name(name): parameter for name, parameter in model.named_parameters()}
    if state.keys() != parameters.keys():
        raise UserError(
            f"{path} does not fit the model: {sorted(state.keys() ^ parameters.keys())[0]} is on one side only"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if state[name].shape != parameter.shape:
                raise UserError(f"{path}: {name} is {tuple(state[name].shape)}, the model has {tuple(parameter.shape)}")
            parameter.copy_(state[name])


def _megatron_arguments(shape: Shape, layout: Layout, iteration: int) -> argparse.Namespace:
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=shape.num_kv_heads != shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        seq_length=shape.max_positions,
        max_position_embeddings=shape.max_positions,
        padded_vocab_size=layout.padded_vocab_size(shape),
        make_vocab_size_divisible_by=1,
        tokenizer_type="HuggingFaceTokenizer",
        vocab_file=None,
        add_position_embedding=False,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
        rotary_percent=1.0,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=None,
        data_parallel_random_init=False,
        params_dtype=shape.torch_dtype,
        bf16=shape.torch_dtype == torch.bfloat16,
        fp16=shape.torch_dtype == torch.float16,
        apply_query_key_layer_scaling=False,
        attention_softmax_in_fp32=False,
        masked_softmax_fusion=False,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        use_distributed_optimizer=False,
        ckpt_format="torch",
        iteration=iteration,
    )
