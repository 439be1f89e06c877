"""What lies between the experts' products on a GPU, as Triton kernels that read each input and write each output once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.sft.kernels.casts import store_cast, warps_of_row
from megatron.sft.kernels.layer import activated

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
def _halves(gate_up, bias, experts, row, columns, width, BIAS: tl.constexpr):  # noqa: N803
    """Gate and up of a row in float32, with their expert's bias."""
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        own = tl.load(experts + row).to(tl.int64) * 2 * width
        gate += tl.load(bias + own + columns, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias + own + width + columns, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _weighted_swiglu(
    gate_up, weights, outputs, bias, experts, width, KIND: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate, up = _halves(gate_up, bias, experts, row, columns, width, BIAS)
    active, _, used, _ = activated(gate, up, KIND)
    result = active * used * tl.load(weights + row)
    tl.store(outputs + row * width + columns, result.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _cast_weighted_swiglu(
    gate_up, weights, outputs, cast, scales, bias, experts, width,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,  # noqa: N803
    WRITTEN: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The same in 8 bits, one row a program, and in 16 if WRITTEN."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate, up = _halves(gate_up, bias, experts, row, columns, width, BIAS)
    active, _, used, _ = activated(gate, up, KIND)
    result = (active * used * tl.load(weights + row)).to(gate_up.dtype.element_ty)
    if WRITTEN:
        tl.store(outputs + row * width + columns, result, mask=inside)
    store_cast(tl.where(inside, result.to(tl.float32), 0.0), cast, scales, row, columns, width, LARGEST, LEAST)


@triton.jit
def _weighted_swiglu_backward(
    gate_up, weights, grad_outputs, grad_gate_up, grad_weights, bias, experts, width,
    KIND: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One row a program, whose weight's gradient is a sum over the row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    kind = grad_gate_up.dtype.element_ty
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        gate, up = _halves(gate_up, bias, experts, row, columns, width, BIAS)
        gradient = tl.load(grad_outputs + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = gradient * weight
        if KIND == "silu":
            share = tl.sigmoid(gate)
            of_weight += gradient * gate * share * up
            of_gate = scaled * up * share * (1.0 + gate * (1.0 - share))
            of_up = scaled * gate * share
        else:
            active, slope, used, unclamped = activated(gate, up, KIND)
            of_weight += gradient * active * used
            of_gate = scaled * used * slope
            of_up = scaled * active * unclamped
        tl.store(grad_gate_up + row * 2 * width + columns, of_gate.to(kind), mask=inside)
        tl.store(grad_gate_up + (row * 2 + 1) * width + columns, of_up.to(kind), mask=inside)
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


# [experts, 2 * width], and int32 [n], each row's expert.
Bias = tuple[Tensor, Tensor] | None


def weighted_swiglu(gate_up: Tensor, weights: Tensor, outputs: Tensor, kind: str = "silu", bias: Bias = None) -> None:
    """outputs [n, width] = activation(first half) * second half of gate_up [n, 2 * width] * weights [n] (float32).

    kind: of `model/swiglu.py`. bias: added to gate_up first.
    """
    num_rows, width = outputs.shape
    if num_rows:
        grid = (num_rows, triton.cdiv(width, _COLUMNS))
        values, experts = bias or (gate_up, gate_up)  # not read without one
        _weighted_swiglu[grid](
            gate_up, weights, outputs, values, experts, width, KIND=kind, BIAS=bias is not None, BLOCK=_COLUMNS, num_warps=4
        )


def cast_weighted_swiglu(
    gate_up: Tensor, weights: Tensor, outputs: Tensor | None, kind: str, bias: Bias, largest: float, least: float
) -> tuple[Tensor, Tensor]:
    """The same in 8 bits, as `casts.cast_rows` makes it of them; `outputs` are written where there are some."""
    num_rows, width = len(gate_up), gate_up.shape[1] // 2
    cast = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=gate_up.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        values, experts = bias or (gate_up, gate_up)
        _cast_weighted_swiglu[(num_rows,)](
            gate_up, weights, gate_up if outputs is None else outputs, cast, scales, values, experts, width,
            LARGEST=largest, LEAST=least, WRITTEN=outputs is not None, KIND=kind, BIAS=bias is not None, BLOCK=block,
            num_warps=warps_of_row(block),
        )  # fmt: skip
    return cast, scales


def weighted_swiglu_backward(
    gate_up: Tensor, weights: Tensor, grad_outputs: Tensor, kind: str = "silu", bias: Bias = None
) -> tuple[Tensor, Tensor]:
    """The gradients of gate_up and of the weights."""
    num_rows, width = grad_outputs.shape
    gradient, of_weights = torch.empty_like(gate_up), torch.empty_like(weights)
    if num_rows:
        block = min(_COLUMNS, triton.next_power_of_2(width))
        values, experts = bias or (gate_up, gate_up)
        _weighted_swiglu_backward[(num_rows,)](
            gate_up, weights, grad_outputs, gradient, of_weights, values, experts, width,
            KIND=kind, BIAS=bias is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return gradient, of_weights
