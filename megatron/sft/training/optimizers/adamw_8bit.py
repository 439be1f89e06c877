"""AdamW on 16-bit weights with moments in 8 bits, in place: OPTIMIZER_PRECISION=8bit.

As adamw.py has it, but that both moments are read from codes and rounded to codes again (checkpoint/moment_codes.py).
"""

from typing import Any

from torch import Tensor

from megatron.sft.checkpoint.moment_codes import (
    BLOCK,
    KINDS,
    decode,
    decoded,
    empty_codes,
    encode,
    exponents_of,
    random_bits,
    seed_of,
)
from megatron.sft.training.optimizers.adamw import Factors, InPlaceAdamW, factors_of, new_moments, step_master

# Elements that the CPU's formula takes at a time: its many passes stay in the processor's cache.
CPU_CHUNK = 1 << 18


class EightBitAdamW(InPlaceAdamW):
    """`InPlaceAdamW` whose state has `exp_avg` and `exp_avg_sq` as uint8 codes, and an exponent for each block of them.

    starts: where in its whole parameter each tensor starts, which is a process's share of it; set before the first step.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.starts: dict[Tensor, int] = {}

    def empty_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Codes and exponents of zeros."""
        return empty_codes(parameter)

    def step_parameter(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Deterministic: the random numbers of rounding follow from the step and the element's place."""
        state, factors = self.state[parameter], factors_of(group, self.grad_scale)
        start, seed = self.starts.get(parameter, 0), seed_of(group["step"])
        codes = [state[name] for kind in KINDS for name in (kind, exponents_of(kind))]
        if parameter.is_cuda:
            from megatron.sft.kernels.adamw_8bit import adamw_8bit_step

            adamw_8bit_step(parameter, state["master_param"], gradient, tuple(codes), start, seed, factors)
            return
        parts = [parameter.view(-1), state["master_param"].view(-1), gradient.view(-1), *(each.view(-1) for each in codes)]
        sizes = (CPU_CHUNK, CPU_CHUNK, CPU_CHUNK, *(CPU_CHUNK, CPU_CHUNK // BLOCK) * 2)
        pieces = zip(*(part.split(size) for part, size in zip(parts, sizes, strict=True)), strict=True)
        for index, piece in enumerate(pieces):
            _step_on_cpu(factors, start + index * CPU_CHUNK, seed, *piece)

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """A state in float32 if it is a moment, else as it is stored."""
        return decoded(self.state[parameter], name) if name in KINDS else super().get_unscaled_state(parameter, name)


def _step_on_cpu(
    factors: Factors, start: int, seed: int, weights: Tensor, lower: Tensor, gradient: Tensor,
    first_codes: Tensor, first_exponents: Tensor, second_codes: Tensor, second_exponents: Tensor,
) -> None:  # fmt: skip
    moments = decode(first_codes, first_exponents, KINDS[0]), decode(second_codes, second_exponents, KINDS[1])
    first, second = new_moments(factors, gradient, *moments)
    step_master(factors, weights, lower, first, second)
    random = random_bits(start, len(weights), seed, weights.device)
    # The upper bits of the two, which matter most, are not of the same bits.
    for codes, exponents, kind, values, bits in (
        (first_codes, first_exponents, KINDS[0], first, random),
        (second_codes, second_exponents, KINDS[1], second, random >> 12),
    ):
        new_codes, new_exponents = encode(values, kind, bits & 0xFFFFF)
        codes.copy_(new_codes)
        exponents.copy_(new_exponents)
