"""What shows a wrong reference, or pairs that are not learned: a check of the first step, and a warning."""

from dataclasses import dataclass, field

from megatron.sft.data.tokenized import data_file
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.training.log_window import Window
from megatron.sft.training.preferences import PairObjective

# By PRECISION, how far the first step may be from the formula: forward passes of the same rows may differ in the last digits.
TOLERANCES = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3, "fp8": 1e-2}


class Guard:
    """In a fresh run whose reference is its start, the first step has rewards 0 and the loss of its formula without a margin.

    With another reference, in a resumed run, with dropout, or without a reference nothing is due: the figures are logged only.
    """

    def __init__(self, plan: RunPlan, objective: PairObjective | None) -> None:
        self._plan, self._objective = plan, objective
        has_dropout = plan.options.lora_dropout > 0
        is_start = plan.reference is not None and plan.reference.is_start and not plan.options.lora_init_from
        self.is_due = is_start and not plan.resume and not has_dropout

    def look(self, window: Window) -> str | None:
        """What is wrong with the first step, None if nothing. Every rank must call it; waits for the device."""
        reference, objective = self._plan.reference, self._objective
        if window.last is None or reference is None or reference.logps is None or objective is None:
            return None  # the step was skipped, so the next one begins with the same weights
        self.is_due = False
        means = window.last.loss.reduced()
        loss, expected = means.pairs.get("preference_loss", means.loss), objective.loss_without_margin
        tolerance = TOLERANCES[self._plan.options.precision]
        rewards = means.pairs["rewards/chosen"], means.pairs["rewards/rejected"]
        # A loss of large numbers, such as 1 / (2 beta) squared, is as exact as their digits.
        is_near = abs(loss - expected) <= tolerance * max(1.0, abs(expected))
        if is_near and all(abs(reward) <= tolerance for reward in rewards):
            return None
        made = reference.logps.manifest
        return (
            f"the first step has the loss {loss:.6f} and the rewards {rewards[0]:.6f} and {rewards[1]:.6f}; with its start as "
            f"the reference they must be {expected:.6f} and 0 to {tolerance:g}: {data_file(reference.logps.prefix, 'json')}, "
            f"made of {made['reference_of']['checkpoint']['path']} with {made['made_with']}, is not what this run computes; "
            "make it again with `bash scripts/4_train.sh reference` in this layout"
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
