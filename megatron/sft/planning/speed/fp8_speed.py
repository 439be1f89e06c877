"""Which of bf16 and the recipes of fp8 is the fastest for a model and a layout, as far as docs/performance.md measured it."""

from dataclasses import dataclass

from megatron.sft.families.architecture import Architecture
from megatron.sft.model.layout import Layout


@dataclass(frozen=True)
class Measured:
    """Speeds by recipe, where bf16's is 1.

    width: hidden units a tensor-parallel process. Casts take time by the hidden size, the products that get faster by the
    hidden size times the width: so the width says what is gained.
    """

    width: int
    gains: dict[str, float]

    @property
    def best(self) -> str:
        return max(self.gains, key=lambda recipe: self.gains[recipe])


# By width; docs/performance.md, "Recipes of fp8", has speeds and commands.
ALL_WEIGHTS = (
    Measured(768, {"tensorwise": 0.89, "delayed": 0.93}),  # 1.5B, TP 2
    Measured(1536, {"tensorwise": 1.15, "delayed": 1.21, "blockwise": 1.07}),  # 1.5B, two copies
    Measured(1792, {"tensorwise": 1.29, "delayed": 1.26}),  # 7B, TP 2
)
CONTEXT = (Measured(1536, {"tensorwise": 0.9}),)  # 1.5B, CP 2
MIXTURE = Measured(2048, {"tensorwise": 1.04})  # four layers of Qwen3-30B-A3B, one GPU
ADAPTERS = (Measured(3584, {"tensorwise": 1.26}),)  # 7B, one GPU


def fp8_advice(architecture: Architecture, layout: Layout, adapters: bool) -> str:
    """What to take, for people: of the nearest case that is as wide as this one or narrower."""
    if architecture.moe is not None:
        return (
            "with experts, two of whose three products PRECISION=fp8 computes in 8 bits on Hopper, "
            f"{_gains(MIXTURE)} in four layers of Qwen3-30B-A3B, for 2 bytes more a weight of experts"
        )
    width = architecture.hidden_size // layout.tensor_parallel
    here = f"with {width:,} hidden units a tensor-parallel process"
    cases = ADAPTERS if adapters else ALL_WEIGHTS
    if layout.context_parallel > 1:
        cases, here = CONTEXT, f"{here} and context parallelism"
    slow = [case for case in cases if case.gains[case.best] < 1]
    fast = [case for case in cases if case not in slow]
    if slow and width <= slow[-1].width:
        return f"bf16 is the fastest {here}: at {slow[-1].width:,} {_gains(slow[-1])}"
    if not fast or width < fast[0].width:
        nearest = (fast or slow)[0]
        return f"not measured {here}: at {nearest.width:,} {_gains(nearest)}"
    nearest = [case for case in fast if case.width <= width][-1]
    return f"FP8_RECIPE={nearest.best} is the fastest measured {here}: at {nearest.width:,} {_gains(nearest)}"


def _gains(case: Measured) -> str:
    return ", ".join(f"{recipe} was {gain} times as fast as bf16" for recipe, gain in case.gains.items())
