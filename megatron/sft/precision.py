"""The precisions that a run can have: the dtype of the weights that compute, and what megatron-core is told of them."""

from typing import Any

import torch

from megatron.sft.errors import UserError
from megatron.sft.families.rules import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "fp32": torch.float32}
_FP8_BLOCK = 16


def precision_fields(precision: str, fp8_recipe: str, shape: Shape, has_transformer_engine: bool) -> dict[str, Any]:
    """TransformerConfig's fields of a precision. With `fp8` the layers' matrix products run in 8 bits on bf16 weights.

    `tensorwise` scales every tensor by its present largest value; `delayed` by the largest of the last 16 steps.
    """
    if precision != "fp8":
        return {}
    if not has_transformer_engine:
        raise UserError(
            "PRECISION=fp8 needs a GPU and Transformer Engine (an nvcr PyTorch container has it): take bf16"
        )
    sizes = {
        "hidden size": shape.hidden_size,
        "MLP width": shape.ffn_hidden_size,
        "query width": shape.num_heads * shape.head_dim,
    }
    for name, size in sizes.items():
        if size % _FP8_BLOCK:
            raise UserError(
                f"PRECISION=fp8 needs sizes that are multiples of {_FP8_BLOCK}, the model's {name} is {size}: take bf16"
            )
    history = {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"} if fp8_recipe == "delayed" else {}
    return {"fp8": "hybrid", "fp8_recipe": fp8_recipe, **history}
