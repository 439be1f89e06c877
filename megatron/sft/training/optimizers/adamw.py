"""AdamW on 16-bit weights and moments, in place: OPTIMIZER_PRECISION=bf16.

A float32 master weight is kept as the bfloat16 weight that the model computes with and the 16 bits that it lacks. Each step
reads weight, lower bits, gradient and both moments once, computes in float32, and writes them back; nothing is copied.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.sft.checkpoint.optimizer_state import join_master_weights, split_master_weights

# Elements of a parameter that the CPU's formula takes at a time, so that its float32 copies stay small.
CPU_CHUNK = 1 << 22


class Factors(NamedTuple):
    """The scalars of a step, in the order of the kernel's arguments.

    decay: 1 - lr * weight_decay. step_size: lr / (1 - beta1^step). inverse_sqrt_correction: 1 / sqrt(1 - beta2^step).
    """

    beta1: float
    beta2: float
    eps: float
    decay: float
    step_size: float
    inverse_sqrt_correction: float
    grad_scale: float


class InPlaceAdamW(torch.optim.Optimizer):
    """The optimizer that megatron-core's distributed optimizer drives, with the interface of Transformer Engine's FusedAdam.

    State of a parameter, in its shape: `exp_avg` and `exp_avg_sq` in bfloat16, `master_param`, the int16 lower halves of the
    master weights (`split_master_weights`). The number of steps stands in the parameter group. Gradients are read from
    `decoupled_grad` (bfloat16 or float32) and multiplied by `grad_scale`, what clipping leaves of them, without being changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **_: Any,  # megatron-core's other arguments to FusedAdam, which name what this class always does
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.grad_scale = 1.0

    def initialize_state(self, parameter: Tensor, *_: Any) -> None:
        """Zero moments, and lower halves of zero: the master weight is the bfloat16 weight."""
        if parameter.dtype != torch.bfloat16:
            raise TypeError(f"a parameter of dtype {parameter.dtype}: this optimizer steps bfloat16 weights")
        self.state[parameter] = {
            **self.empty_moments(parameter),
            "master_param": torch.zeros_like(parameter, dtype=torch.int16),
        }

    def empty_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Both moments, zero."""
        return {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}

    def allocate(self, num_steps: int) -> None:
        """Give every parameter its state, as after `num_steps` steps, to be filled from a checkpoint."""
        for group in self.param_groups:
            group["step"] = num_steps
            for parameter in group["params"]:
                self.initialize_state(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient. Deterministic: every element is computed alone."""
        for parameter, gradient, group in self.begin_step():
            self.step_parameter(parameter, gradient, group)

    def step_parameter(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of a parameter, which has its state."""
        state, factors = self.state[parameter], factors_of(group, self.grad_scale)
        tensors = (parameter, state["master_param"], gradient, state["exp_avg"], state["exp_avg_sq"])
        if parameter.is_cuda:
            from megatron.sft.kernels.adamw import adamw_step

            adamw_step(*tensors, factors)
            return
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, parameter.numel(), CPU_CHUNK):
            _step_on_cpu(factors, *(tensor[start : start + CPU_CHUNK] for tensor in flat))

    def begin_step(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Every parameter that has a gradient, with it and the parameter's group, whose count of steps grows by one; it has its
        state then."""
        for group in self.param_groups:
            group["step"] = int(group["step"]) + 1
            for parameter in group["params"]:
                gradient = getattr(parameter, "decoupled_grad", None)
                if gradient is None or not parameter.numel():
                    continue
                if not self.state[parameter]:
                    self.initialize_state(parameter)
                yield parameter, gradient, group

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """A state as it is stored; nothing is scaled here."""
        state: Tensor = self.state[parameter][name]
        return state

    def set_scaled_state(self, parameter: Tensor, name: str, values: Tensor) -> None:
        """Set a state from a tensor of the same meaning."""
        self.state[parameter][name].copy_(values)


def factors_of(group: dict[str, Any], grad_scale: float) -> Factors:
    """The scalars of a parameter group's present step."""
    (beta1, beta2), step = group["betas"], group["step"]
    return Factors(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        decay=1.0 - group["lr"] * group["weight_decay"],
        step_size=group["lr"] / (1.0 - beta1**step),
        inverse_sqrt_correction=1.0 / math.sqrt(1.0 - beta2**step),
        grad_scale=grad_scale,
    )


def _step_on_cpu(
    factors: Factors, weights: Tensor, lower: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
) -> None:
    """The kernel's formula, in float32."""
    first, second = new_moments(factors, gradient, exp_avg.float(), exp_avg_sq.float())
    step_master(factors, weights, lower, first, second)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)


def new_moments(factors: Factors, gradient: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments after a step, in float32."""
    gradient = gradient.float() * factors.grad_scale
    first = factors.beta1 * first + (1.0 - factors.beta1) * gradient
    second = factors.beta2 * second + (1.0 - factors.beta2) * gradient * gradient
    return first, second


def step_master(factors: Factors, weights: Tensor, lower: Tensor, first: Tensor, second: Tensor) -> None:
    """AdamW with bias correction and decoupled weight decay (Loshchilov and Hutter, 2019) by the float32 moments."""
    master = join_master_weights(weights, lower) * factors.decay
    master -= factors.step_size * first / (second.sqrt() * factors.inverse_sqrt_correction + factors.eps)
    rounded, remainder = split_master_weights(master)
    weights.copy_(rounded)
    lower.copy_(remainder)
