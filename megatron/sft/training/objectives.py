"""What gives every trained token its weight in the loss: a pair's loss as a formula, its derivatives, and its source.

An answer's s is the sum of its trained tokens' log p; a is s - s of the reference for the chosen answer, b for the rejected
one, n and m are their numbers of trained tokens. The weight of a token is minus the derivative of the loss by its log p. Losses
and names are those of TRL 1.16 (trl/trainer/dpo_trainer.py, trl/experimental/cpo, trl/experimental/orpo).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron.sft.planning.options import TrainOptions


class PairLoss(NamedTuple):
    """Of each pair, float64 [pairs]: the loss, and its derivatives by the chosen and by the rejected answer's x in
    `Answers`."""

    value: Tensor
    by_chosen: Tensor
    by_rejected: Tensor


@dataclass(frozen=True)
class Answers:
    """x of the chosen (c) and of the rejected answers (j), float64 [pairs], and their numbers of trained tokens.

    x is a and b, what an f-divergence makes of them, or, without a reference, s.
    """

    c: Tensor
    j: Tensor
    n: Tensor
    m: Tensor


@dataclass(frozen=True)
class Settings:
    """Numbers of the formulas: beta, epsilon (DPO_LABEL_SMOOTHING), tau (DPO_DISCOPOP_TAU), gamma (SIMPO_GAMMA)."""

    beta: float = 0.1
    epsilon: float = 0.0
    tau: float = 0.05
    gamma: float = 0.5


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), which torch's own softplus rounds to x above 20."""
    return -logsigmoid(-x)


def _of_difference(answers: Answers, value: Tensor, slope: Tensor) -> PairLoss:
    """A loss of c - j with this value and derivative."""
    return PairLoss(value, slope, -slope)


def _of_mean_difference(answers: Answers, value: Tensor, slope: Tensor) -> PairLoss:
    """A loss of c/n - j/m with this value and derivative."""
    return PairLoss(value, slope / answers.n, -slope / answers.m)


def _means(answers: Answers) -> Tensor:
    return answers.c / answers.n - answers.j / answers.m


def sigmoid(answers: Answers, k: Settings) -> PairLoss:
    """-log σ(z), z = beta (c - j); by z: -σ(-z). Rafailov 2023, arXiv 2305.18290, eq. 7."""
    z = k.beta * (answers.c - answers.j)
    return _of_difference(answers, softplus(-z), -k.beta * torch.sigmoid(-z))


def hinge(answers: Answers, k: Settings) -> PairLoss:
    """max(0, 1 - z); by z: -1 below 1. Zhao 2023 (SLiC), arXiv 2305.10425."""
    z = k.beta * (answers.c - answers.j)
    return _of_difference(answers, torch.relu(1 - z), -k.beta * (z < 1).double())


def ipo(answers: Answers, k: Settings) -> PairLoss:
    """(y - 1 / (2 beta))², y = c/n - j/m; by y: 2 (y - …). Azar 2023, arXiv 2310.12036, eq. 17; the means are its authors'."""
    error = _means(answers) - 1 / (2 * k.beta)
    return _of_mean_difference(answers, error**2, 2 * error)


def sigmoid_norm(answers: Answers, k: Settings) -> PairLoss:
    """-log σ(z), z = beta (c/n - j/m). Lambert 2024 (Tülu 3), arXiv 2411.15124."""
    z = k.beta * _means(answers)
    return _of_mean_difference(answers, softplus(-z), -k.beta * torch.sigmoid(-z))


def robust(answers: Answers, k: Settings) -> PairLoss:
    """(-(1 - ε) log σ(z) + ε log σ(-z)) / (1 - 2ε); by z: -((1 - ε) σ(-z) + ε σ(z)) / (1 - 2ε). Chowdhury 2024, arXiv
    2403.00409."""
    z, e = k.beta * (answers.c - answers.j), k.epsilon
    value = ((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e)
    return _of_difference(answers, value, -k.beta * ((1 - e) * torch.sigmoid(-z) + e * torch.sigmoid(z)) / (1 - 2 * e))


def cdpo(answers: Answers, k: Settings) -> PairLoss:
    """-(1 - ε) log σ(z) - ε log σ(-z); by z: σ(z) - (1 - ε). Mitchell 2023, "A note on DPO with noisy preferences"; the
    `sigmoid` with label smoothing of AutoAlign and ms-swift. TRL 1.16 has it no more."""
    z, e = k.beta * (answers.c - answers.j), k.epsilon
    return _of_difference(answers, (1 - e) * softplus(-z) + e * softplus(z), k.beta * (torch.sigmoid(z) - (1 - e)))


def exo(answers: Answers, k: Settings) -> PairLoss:
    """q (log q - log(1 - ε)) + (1 - q) (log(1 - q) - log ε), q = σ(z); by z: q (1 - q) (z - log((1 - ε) / ε)). Ji 2024, arXiv
    2402.00856, eq. 16."""
    z, e = k.beta * (answers.c - answers.j), k.epsilon
    q, rest = torch.sigmoid(z), torch.sigmoid(-z)
    value = q * (logsigmoid(z) - math.log1p(-e)) + rest * (logsigmoid(-z) - math.log(e))
    return _of_difference(answers, value, k.beta * q * rest * (z - math.log1p(-e) + math.log(e)))


def discopop(answers: Answers, k: Settings) -> PairLoss:
    """(1 - w) (-log σ(z)) + w exp(-z), w = σ(z / τ); by z: w (1 - w) / τ (exp(-z) + log σ(z)) - (1 - w) σ(-z) - w exp(-z).
    Lu 2024, arXiv 2406.08414, eq. 5."""
    z = k.beta * (answers.c - answers.j)
    w, logistic, exponential = torch.sigmoid(z / k.tau), softplus(-z), torch.exp(-z)
    slope = w * (1 - w) / k.tau * (exponential - logistic) - (1 - w) * torch.sigmoid(-z) - w * exponential
    return _of_difference(answers, (1 - w) * logistic + w * exponential, k.beta * slope)


def nca(answers: Answers, k: Settings) -> PairLoss:
    """-log σ(u) - ½ log σ(-u) - ½ log σ(-v), u = beta c, v = beta j; by u: ½ σ(u) - σ(-u), by v: ½ σ(v). Chen 2024, arXiv
    2402.05369."""
    u, v = k.beta * answers.c, k.beta * answers.j
    value = softplus(-u) + 0.5 * softplus(u) + 0.5 * softplus(v)
    return PairLoss(value, k.beta * (0.5 * torch.sigmoid(u) - torch.sigmoid(-u)), 0.5 * k.beta * torch.sigmoid(v))


def bco_pair(answers: Answers, k: Settings) -> PairLoss:
    """-log σ(u) - log σ(-v), u = beta c, v = beta j; by u: -σ(-u), by v: σ(v). Jung 2024, arXiv 2404.04656, without its shift
    of the rewards by their running mean, as in TRL 1.16."""
    u, v = k.beta * answers.c, k.beta * answers.j
    return PairLoss(softplus(-u) + softplus(v), -k.beta * torch.sigmoid(-u), k.beta * torch.sigmoid(v))


def sppo_hard(answers: Answers, k: Settings) -> PairLoss:
    """(c - 1/(2 beta))² + (j + 1/(2 beta))². Wu 2024, arXiv 2405.00675, eq. 4.7 with probabilities 1 and 0."""
    above, below = answers.c - 0.5 / k.beta, answers.j + 0.5 / k.beta
    return PairLoss(above**2 + below**2, 2 * above, 2 * below)


def apo_zero(answers: Answers, k: Settings) -> PairLoss:
    """1 - σ(u) + σ(v), u = beta c, v = beta j; σ' = σ (1 - σ). D'Oosterlinck 2024, arXiv 2408.06266, eq. 7."""
    u, v = torch.sigmoid(k.beta * answers.c), torch.sigmoid(k.beta * answers.j)
    return PairLoss(1 - u + v, -k.beta * u * (1 - u), k.beta * v * (1 - v))


def apo_down(answers: Answers, k: Settings) -> PairLoss:
    """σ(u) + 1 - σ(z), u = beta c, z = beta (c - j). D'Oosterlinck 2024, arXiv 2408.06266, eq. 8."""
    u, z = torch.sigmoid(k.beta * answers.c), torch.sigmoid(k.beta * (answers.c - answers.j))
    of_difference = k.beta * z * (1 - z)
    return PairLoss(u + 1 - z, k.beta * u * (1 - u) - of_difference, of_difference)


def simpo(answers: Answers, k: Settings) -> PairLoss:
    """cdpo's formula of z = beta (c/n - j/m) - gamma, without a reference. Meng 2024, arXiv 2405.14734, eq. 6."""
    z, e = k.beta * _means(answers) - k.gamma, k.epsilon
    value = (1 - e) * softplus(-z) + e * softplus(z)
    return _of_mean_difference(answers, value, k.beta * (torch.sigmoid(z) - (1 - e)))


def orpo(answers: Answers, k: Settings) -> PairLoss:
    """-beta log σ(o), o = log-odds of c/n minus those of j/m, where log p has the log-odds log p - log(1 - p), whose derivative
    is 1 / (1 - p). Hong 2024, arXiv 2403.07691, eq. 6 and 7; beta is its lambda."""
    c, j = answers.c / answers.n, answers.j / answers.m
    # A probability of exactly 1 has no odds; 1 - p then counts as the smallest number.
    not_c, not_j = (-torch.expm1(x).clamp(max=-torch.finfo(x.dtype).tiny) for x in (c, j))
    odds = (c - not_c.log()) - (j - not_j.log())
    slope = -k.beta * torch.sigmoid(-odds)
    return PairLoss(k.beta * softplus(-odds), slope / not_c / answers.n, -slope / not_j / answers.m)


# By the words of DPO_LOSS: losses of a and b.
DPO_LOSSES: dict[str, Callable[[Answers, Settings], PairLoss]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "cdpo": cdpo,
    "exo": exo,
    "nca": nca,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
# By the words of OBJECTIVE: losses of s. CPO (Xu 2024, arXiv 2401.08417, eq. 3) is cdpo's formula of it.
REFERENCE_FREE: dict[str, Callable[[Answers, Settings], PairLoss]] = {"simpo": simpo, "orpo": orpo, "cpo": cdpo}


def reverse_kl(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, and its derivative 1: plain DPO. This and the other divergences: Wang 2023, arXiv 2309.16240."""
    return x, torch.ones_like(x)


def forward_kl(x: Tensor) -> tuple[Tensor, Tensor]:
    """1 - exp(-x); derivative exp(-x)."""
    return -torch.expm1(-x), torch.exp(-x)


def js_divergence(x: Tensor) -> tuple[Tensor, Tensor]:
    """log 2 + log σ(x); derivative σ(-x)."""
    return math.log(2) + logsigmoid(x), torch.sigmoid(-x)


def alpha_divergence(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(exp(k x) - 1) / k, k = alpha - 1; derivative exp(k x), 0 where k x is cut at 80, as in TRL. x itself for alpha 1."""
    k = alpha - 1
    if abs(k) < 1e-6:
        return reverse_kl(x)
    power = k * x
    return torch.expm1(power.clamp(max=80.0)) / k, torch.exp(power) * (power <= 80.0)


# By the words of DPO_F_DIVERGENCE: what takes the place of a and b, and its derivative.
Divergence = Callable[[Tensor], tuple[Tensor, Tensor]]
DIVERGENCES: dict[str, Divergence] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js_divergence": js_divergence}


def divergence_of(word: str, alpha: float) -> Divergence:
    """The divergence with this word for DPO_F_DIVERGENCE and this DPO_F_ALPHA."""
    return partial(alpha_divergence, alpha=alpha) if word == "alpha_divergence" else DIVERGENCES[word]


def probability(token_losses: Tensor) -> Tensor:
    """p of tokens whose -log p is given: the factor of DFT, whose loss is -sg(p) log p (Wu 2025, arXiv 2508.05629)."""
    return torch.exp(-token_losses)


def settings_of(options: TrainOptions) -> Settings:
    return Settings(options.dpo_beta, options.dpo_label_smoothing, options.dpo_discopop_tau, options.simpo_gamma)
