"""What shows a wrong reference, or pairs that are not learned: a check before the first step, and a warning."""

from dataclasses import dataclass, field

from megatron.sft.data.tokenized import data_file
from megatron.sft.training.engine import Engine
from megatron.sft.training.feeder import Feeder

# By PRECISION, how far the start may be from the formula: forward passes of the same rows may differ in the last digits.
TOLERANCES = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3, "fp8": 1e-2}


def wrong_start(engine: Engine, feeder: Feeder) -> str | None:
    """What is wrong with the reference of a fresh run whose reference is its start: before the first step its rewards must be
    0, and the loss that of its formula without a margin. None if nothing is; every rank must call it.

    The first rows of the data are computed as they were for the reference, so that the last digits agree too. With another
    reference, in a resumed run, or without a reference nothing is compared.
    """
    plan, objective = engine.plan, engine.objective
    reference = plan.reference
    if reference is None or reference.logps is None or objective is None or not reference.is_start:
        return None
    if plan.options.lora_init_from:  # it starts from an adapter, which the reference has not
        return None
    rows = list(range(min(plan.options.global_batch_size, len(plan.rows))))
    batches = [feeder.micro_batch([number]) for number in feeder.single_rows(rows)]
    means = engine.evaluate(batches).reduced()
    loss, expected = means.pairs.get("preference_loss", means.loss), objective.loss_without_margin
    tolerance = TOLERANCES[plan.options.precision]
    rewards = means.pairs["rewards/chosen"], means.pairs["rewards/rejected"]
    # A loss of large numbers, such as 1 / (2 beta) squared, is as exact as their digits.
    is_near = abs(loss - expected) <= tolerance * max(1.0, abs(expected))
    if is_near and all(abs(reward) <= tolerance for reward in rewards):
        return None
    made = reference.logps.manifest
    return (
        f"before the first step the loss is {loss:.6f} and the rewards are {rewards[0]:.6f} and {rewards[1]:.6f}; with the "
        f"start as the reference they must be {expected:.6f} and 0 to {tolerance:g}: "
        f"{data_file(reference.logps.prefix, 'json')}, made of {made['reference_of']['checkpoint']['path']} with "
        f"{made['made_with']}, is not what this run computes; make it again with `bash scripts/4_train.sh reference` in this "
        "layout"
    )


@dataclass
class AccuracyWatch:
    """Warns, once, if the accuracies of that many logged steps in a row stay below one half."""

    patience: int = 20
    _below: int = 0
    _warned: bool = field(default=False, repr=False)

    def look(self, accuracy: float) -> str:
        """A warning in words, or an empty text."""
        self._below = self._below + 1 if accuracy < 0.5 else 0
        if self._below < self.patience or self._warned:
            return ""
        self._warned = True
        return (
            f"the rejected answer had the larger reward in most pairs of the last {self._below} logged steps: are chosen and "
            "rejected swapped in the data, is LR too large, or DPO_BETA too small?"
        )
