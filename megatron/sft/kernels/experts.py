"""What lies between the experts' products on a GPU, as Triton kernels that read each input and write each output once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # of a row, a program


@triton.jit
def _sum_rows(rows, places, outputs, width, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """outputs[t] = the sum over j of rows[places[t, j]], in float32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for chosen in tl.static_range(CHOSEN):
        place = tl.load(places + token * CHOSEN + chosen).to(tl.int64)
        total += tl.load(rows + place * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(outputs + token * width + columns, total.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_swiglu(gate_up, weights, outputs, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up * tl.load(weights + row)
    tl.store(outputs + row * width + columns, result.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_swiglu_backward(
    gate_up, weights, grad_outputs, grad_gate_up, grad_weights, width, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    """One row a program, whose weight's gradient is a sum over the row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    kind = grad_gate_up.dtype.element_ty
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grad_outputs + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        of_weight += gradient * gate * share * up
        scaled = gradient * weight
        of_gate = scaled * up * share * (1.0 + gate * (1.0 - share))
        tl.store(grad_gate_up + row * 2 * width + columns, of_gate.to(kind), mask=inside)
        tl.store(grad_gate_up + (row * 2 + 1) * width + columns, (scaled * gate * share).to(kind), mask=inside)
    tl.store(grad_weights + row, tl.sum(of_weight, axis=0))


def sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """[t, width]: for each token the sum of its rows. rows [n, width], contiguous; places [t, chosen] int64."""
    num_tokens, chosen = places.shape
    width = rows.shape[1]
    outputs = torch.empty(num_tokens, width, dtype=rows.dtype, device=rows.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(width, _COLUMNS))
        _sum_rows[grid](rows, places, outputs, width, CHOSEN=chosen, BLOCK=_COLUMNS, num_warps=4)
    return outputs


def weighted_swiglu(gate_up: Tensor, weights: Tensor, outputs: Tensor) -> None:
    """outputs [n, width] = silu(first half) * second half of gate_up [n, 2 * width] * weights [n] (float32)."""
    num_rows, width = outputs.shape
    if num_rows:
        grid = (num_rows, triton.cdiv(width, _COLUMNS))
        _weighted_swiglu[grid](gate_up, weights, outputs, width, BLOCK=_COLUMNS, num_warps=4)


def weighted_swiglu_backward(gate_up: Tensor, weights: Tensor, grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate_up and of the weights."""
    num_rows, width = grad_outputs.shape
    gradient, of_weights = torch.empty_like(gate_up), torch.empty_like(weights)
    if num_rows:
        block = min(_COLUMNS, triton.next_power_of_2(width))
        _weighted_swiglu_backward[(num_rows,)](
            gate_up, weights, grad_outputs, gradient, of_weights, width, BLOCK=block, num_warps=4
        )
    return gradient, of_weights
