"""The formulas of objectives: derivatives against autograd's, limits, and settings that do not go together."""

import math
import re

import pytest
import torch

from megatron.sft.planning import options as settings
from megatron.sft.planning.objective_checks import F_DIVERGENCE_LOSSES, objective_problems
from megatron.sft.planning.options import TrainOptions, parse
from megatron.sft.runtime.errors import UserError
from megatron.sft.training import objectives
from megatron.sft.training.objectives import Answers, Settings
from megatron.sft.training.pair_guard import AccuracyWatch
from megatron.sft.training.preferences import PairObjective

LOSSES = {**objectives.DPO_LOSSES, **objectives.REFERENCE_FREE}
DIVERGENCES = [(word, 0.5) for word in objectives.DIVERGENCES]
DIVERGENCES += [("alpha_divergence", alpha) for alpha in (0.3, 0.5, 1.0, 2.0)]
NEEDED = ["--load", "model", "--data-path", "data", "--save", "run"]


def _answers(largest: float, negative: bool) -> Answers:
    """x on both sides of zero, or below it as log-probabilities are; lengths from one token on."""
    generator = torch.Generator().manual_seed(3)
    c, j = (largest * torch.randn(2, 200, generator=generator, dtype=torch.float64)).unbind()
    n, m = torch.randint(1, 40, (2, 200), generator=generator).double().unbind()
    return Answers(-c.abs(), -j.abs(), n, m) if negative else Answers(c, j, n, m)


def _options(*words: str) -> TrainOptions:
    return parse([*NEEDED, *words])[1]


@pytest.mark.parametrize("largest", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_are_autograds(name: str, largest: float) -> None:
    for numbers in (Settings(epsilon=0.1), Settings(beta=0.8, epsilon=0.3, tau=0.4, gamma=2.0)):
        answers = _answers(largest, negative=name in objectives.REFERENCE_FREE)
        c, j = answers.c.clone().requires_grad_(), answers.j.clone().requires_grad_()
        loss = LOSSES[name](Answers(c, j, answers.n, answers.m), numbers)
        by_c, by_j = torch.autograd.grad(loss.value.sum(), [c, j])
        torch.testing.assert_close(loss.by_chosen.detach(), by_c, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss.by_rejected.detach(), by_j, rtol=1e-9, atol=1e-12)
        assert torch.isfinite(loss.value).all()


@pytest.mark.parametrize(("word", "alpha"), DIVERGENCES)
def test_derivatives_of_divergences_are_autograds(word: str, alpha: float) -> None:
    x = torch.linspace(-30, 30, 201, dtype=torch.float64, requires_grad=True)
    value, slope = objectives.divergence_of(word, alpha)(x)
    (expected,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope.detach(), expected, rtol=1e-9, atol=1e-12)
    assert float(objectives.divergence_of(word, alpha)(torch.zeros(1, dtype=torch.float64))[0]) == pytest.approx(0, abs=1e-12)


def test_conservative_label_smoothing_is_its_formula() -> None:
    """AutoAlign's and ms-swift's `sigmoid` with label smoothing, which TRL has no more."""
    answers = _answers(5.0, negative=False)
    h = answers.c - answers.j
    expected = -0.9 * torch.log(torch.sigmoid(0.1 * h)) - 0.1 * torch.log(torch.sigmoid(-0.1 * h))
    torch.testing.assert_close(objectives.cdpo(answers, Settings(epsilon=0.1)).value, expected)
    torch.testing.assert_close(objectives.cdpo(answers, Settings()).value, objectives.sigmoid(answers, Settings()).value)


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss = objectives.orpo(Answers(zero, -one, one, one), Settings())
    assert all(torch.isfinite(part).all() for part in loss)


def test_the_words_of_settings_are_those_of_the_formulas() -> None:
    assert tuple(objectives.DPO_LOSSES) == settings.DPO_LOSSES
    assert (*objectives.DIVERGENCES, "alpha_divergence") == settings.DIVERGENCES
    assert set(F_DIVERGENCE_LOSSES) < set(settings.DPO_LOSSES)


# By hand: beta 0.1, and 0.5 / beta is 5.
AT_ZERO = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "sigmoid_norm": math.log(2),
    "robust": math.log(2),
    "cdpo": math.log(2),
    "exo": 0.5 * (math.log(0.5 / 0.9) + math.log(0.5 / 0.1)),
    "nca": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * (math.log(2) + 1),
}


@pytest.mark.parametrize("loss", settings.DPO_LOSSES)
def test_without_a_margin_each_loss_is_what_its_formula_gives(loss: str) -> None:
    smoothing = ["--dpo-label-smoothing", "0.1"] if loss in ("robust", "cdpo", "exo") else []
    options = _options("--objective", "dpo", "--dpo-loss", loss, *smoothing)
    assert PairObjective(options).loss_without_margin == pytest.approx(AT_ZERO[loss], rel=1e-12)


WRONG = {
    "--objective dpo --dpo-loss exo": "DPO_LOSS=exo needs a DPO_LABEL_SMOOTHING above 0",
    "--objective dpo --dpo-label-smoothing 0.1": "DPO_LOSS=sigmoid: leave it at 0, or take DPO_LOSS=cdpo",
    "--objective dpo --dpo-loss robust --dpo-label-smoothing 0.5": "DPO_LABEL_SMOOTHING=0.5 must be at least 0 and below 0.5",
    "--objective dpo --dpo-loss apo_zero --dpo-f-divergence forward_kl": "does not go with DPO_LOSS=apo_zero",
    "--objective dpo --dpo-f-alpha 2": "DPO_F_ALPHA=2.0 has no effect with OBJECTIVE=dpo and DPO_F_DIVERGENCE=reverse_kl",
    "--objective dpo --dpo-discopop-tau 0.1": "DPO_DISCOPOP_TAU=0.1 has no effect with OBJECTIVE=dpo and DPO_LOSS=sigmoid",
    "--objective dpo --dpo-beta 0": "DPO_BETA=0.0 must be above 0",
    "--objective dpo --dpo-ld-alpha 1.5": "DPO_LD_ALPHA=1.5 must lie between 0 and 1",
    "--objective dpo --sft-weight -2": "SFT_WEIGHT=-2.0 must be at least 0, or -1",
    "--objective dpo --loss-average conversation": "LOSS_AVERAGE=conversation has no effect with OBJECTIVE=dpo: unset it, or "
    "set OBJECTIVE to one of sft, dft",
    "--objective dpo --simpo-gamma 1": "SIMPO_GAMMA=1.0 has no effect with OBJECTIVE=dpo: unset it, or set OBJECTIVE to one "
    "of simpo",
    "--objective simpo --reference model": "REFERENCE=model has no effect with OBJECTIVE=simpo",
    "--objective orpo --dpo-loss hinge": "DPO_LOSS=hinge has no effect with OBJECTIVE=orpo",
    "--objective sft --dpo-beta 0.2": "DPO_BETA=0.2 has no effect with OBJECTIVE=sft: unset it, or set OBJECTIVE to one of dpo",
    "--objective dft --sft-weight 1": "SFT_WEIGHT=1.0 has no effect with OBJECTIVE=dft",
    "--objective dpo --lora-rank 4 --lora-init-from folder": "LORA_INIT_FROM with OBJECTIVE=dpo does not say what the "
    "reference is",
}


@pytest.mark.parametrize("words", WRONG)
def test_settings_that_do_not_go_together_are_named(words: str) -> None:
    problems = list(objective_problems(_options(*words.split())))
    assert len(problems) == 1 and WRONG[words] in problems[0] and "\n" not in problems[0]


OTHERS = {"kto": "KTO is not built", "rm": "reward models are not built", "grpo": "reinforcement learning is not built"}


@pytest.mark.parametrize("word", OTHERS)
def test_objectives_that_are_not_built_get_advice(word: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"OBJECTIVE: {OTHERS[word]}")):
        _options("--objective", word)
    with pytest.raises(UserError, match="OBJECTIVE: invalid choice: 'dop'"):
        _options("--objective", "dop")


def test_accuracies_that_stay_below_one_half_give_one_warning() -> None:
    watch = AccuracyWatch(patience=3)
    said = [bool(watch.look(accuracy)) for accuracy in (0.4, 0.4, 0.6, 0.1, 0.2, 0.49, 0.3, 0.2)]
    assert said == [False] * 5 + [True] + [False] * 2
