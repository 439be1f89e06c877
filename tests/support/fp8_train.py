"""megatron.sft.train with PRECISION=fp8 on the CPU: experts in 8 bits as torch computes them, everything else in bf16.

Only what asks for Transformer Engine is replaced: the check that refuses fp8 without it, ours and megatron-core's, and what its
layers keep.
"""

from typing import Any

from megatron.sft import train
from megatron.sft.model import config
from megatron.sft.model.decoder_layer import DecoderLayer
from megatron.sft.runtime.errors import run


def built(**fields: Any) -> Any:
    """megatron-core's configuration, in fp8 where it is asked for."""
    later = {name: fields.pop(name) for name in ("fp8", "fp8_recipe") if name in fields}
    result = MADE(**fields)
    vars(result).update(later)
    return result


if __name__ == "__main__":
    MADE = config.TransformerConfig
    config.TransformerConfig = built  # type: ignore[assignment,misc]
    config._fp8_fields = lambda recipe, *_: {"fp8": "hybrid", "fp8_recipe": recipe}
    DecoderLayer._keep_16_bit_inputs = lambda _: None  # type: ignore[method-assign]
    run(train.main)
