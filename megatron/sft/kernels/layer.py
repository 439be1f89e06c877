"""The decoder layer's memory-bound steps on a GPU as Triton kernels that read each input and write each output once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048  # of the gated activation, a program


@triton.jit
def _norm(
    inputs, added, weight, sums, outputs, inverse_rms, width, eps,
    ADD: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """outputs = weight (+ 1 if CENTERED) * s / rms(s) with s = inputs (+ added, then written to sums); one row a program."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    start = row.to(tl.int64) * width
    values = tl.load(inputs + start + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(added + start + columns, mask=inside, other=0.0).to(tl.float32)
        stored = values.to(sums.dtype.element_ty)
        tl.store(sums + start + columns, stored, mask=inside)
        values = stored.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        scale += 1.0
    tl.store(outputs + start + columns, (values * inverse * scale).to(outputs.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + row, inverse)


@triton.jit
def _norm_backward(
    sums, weight, inverse_rms, grad_outputs, grad_sums, grad_inputs, grad_weight, num_rows, width,
    ADD: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """grad_inputs (= gradient of sums through the norm, + grad_sums) of every num_programs-th row; partial weight gradients."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        scale += 1.0
    of_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, num_rows, num_programs):
        start = tl.cast(row, tl.int64) * width
        gradient = tl.load(grad_outputs + start + columns, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_rms + row)
        normed = tl.load(sums + start + columns, mask=inside, other=0.0).to(tl.float32) * inverse
        of_weight += gradient * normed
        scaled = gradient * scale
        result = inverse * (scaled - normed * (tl.sum(scaled * normed, axis=0) / width))
        if ADD:
            result += tl.load(grad_sums + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_inputs + start + columns, result.to(grad_inputs.dtype.element_ty), mask=inside)
    tl.store(grad_weight + program.to(tl.int64) * width + columns, of_weight, mask=inside)


@triton.jit
def activated(gate, up, KIND: tl.constexpr):  # noqa: N803
    """(the gate's activation, its derivative, up as it is used, 1 where up is not clamped) of `model/swiglu.py`'s kinds."""
    if KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is the sigmoid of 2 u.
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        active = gate * share
        slope = share + active * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * gate * gate))
        used, unclamped = up, 1.0
    elif KIND == "clamped_silu":
        low = tl.minimum(gate, 7.0)
        share = tl.sigmoid(1.702 * low)
        active = low * share
        slope = tl.where(gate <= 7.0, share * (1.0 + 1.702 * low * (1.0 - share)), 0.0)
        used = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        unclamped = tl.where((up >= -7.0) & (up <= 7.0), 1.0, 0.0)
    else:
        active = gate * tl.sigmoid(gate)
        slope, used, unclamped = 0.0, up, 1.0  # `_swiglu_backward` has its own
    return active, slope, used, unclamped


@triton.jit
def _swiglu(gate_up, outputs, width, KIND: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """outputs[row, c] = activation(gate_up[row, c]) * gate_up[row, width + c]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    active, _, used, _ = activated(gate, up, KIND)
    tl.store(outputs + row * width + columns, (active * used).to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate_up, grad_outputs, grad_gate_up, width, KIND: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(grad_outputs + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        share = tl.sigmoid(gate)
        of_gate = gradient * up * share * (1.0 + gate * (1.0 - share))
        of_up = gradient * gate * share
    else:
        active, slope, used, unclamped = activated(gate, up, KIND)
        of_gate = gradient * used * slope
        of_up = gradient * active * unclamped
    kind = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + row * 2 * width + columns, of_gate.to(kind), mask=inside)
    tl.store(grad_gate_up + (row * 2 + 1) * width + columns, of_up.to(kind), mask=inside)


@triton.jit
def _gate(context, gates, outputs, width, row_stride, group_stride, BLOCK: tl.constexpr):  # noqa: N803
    """outputs = context * sigmoid(gates): one token's heads of one KV group a program. Only `gates` is strided."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own = (token * tl.num_programs(1) + group) * width + columns
    gate = tl.load(gates + token * row_stride + group * group_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(context + own, mask=inside, other=0.0).to(tl.float32)
    tl.store(outputs + own, (value * tl.sigmoid(gate)).to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(
    context, gates, gradients, of_context, of_gates, width, row_stride, group_stride, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own = (token * tl.num_programs(1) + group) * width + columns
    gate = tl.load(gates + token * row_stride + group * group_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(context + own, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradients + own, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    kind = of_context.dtype.element_ty
    tl.store(of_context + own, (gradient * share).to(kind), mask=inside)
    tl.store(of_gates + own, (gradient * value * share * (1.0 - share)).to(kind), mask=inside)


@triton.jit
def _rotate_heads(
    qkv, tables, queries, keys, values, num_tokens, num_groups,
    QUERIES: tl.constexpr, OTHERS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,  # noqa: N803
    REST_BLOCK: tl.constexpr, TOKENS: tl.constexpr, OWN_TABLES: tl.constexpr, BACKWARD: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Some tokens of one head between `qkv` (by group: queries, key, value) and its own array, rotated unless a value.

    The first 2 HALF dimensions of a head's DIM are rotated, the rest is copied. OWN_TABLES: the queries' tables follow the
    others'. BACKWARD goes from the arrays to qkv, and rotates the other way.
    """
    head = tl.program_id(1)
    group, place = head // (QUERIES + OTHERS), head % (QUERIES + OTHERS)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pairs = tl.arange(0, HALF_BLOCK)
    mask = (tokens < num_tokens)[:, None] & (pairs < HALF)[None, :]
    rows = tokens.to(tl.int64)[:, None]
    in_qkv = qkv + (rows * num_groups * (QUERIES + OTHERS) + head) * DIM + pairs[None, :]
    if place < QUERIES:
        alone = queries + (rows * num_groups * QUERIES + group * QUERIES + place) * DIM + pairs[None, :]
    elif place == QUERIES:
        alone = keys + (rows * num_groups + group) * DIM + pairs[None, :]
    else:
        alone = values + (rows * num_groups + group) * DIM + pairs[None, :]
    source = alone if BACKWARD else in_qkv
    target = in_qkv if BACKWARD else alone
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if place <= QUERIES:
        angles = rows * HALF + pairs[None, :]
        if OWN_TABLES:
            angles += tl.where(place < QUERIES, 2, 0) * num_tokens.to(tl.int64) * HALF
        cosine = tl.load(tables + angles, mask=mask, other=0.0)
        sine = tl.load(tables + num_tokens.to(tl.int64) * HALF + angles, mask=mask, other=0.0)
        if BACKWARD:
            sine = -sine
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        first = rotated
    tl.store(target, first.to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, second.to(target.dtype.element_ty), mask=mask)
    if REST_BLOCK > 0:
        rest = tl.arange(0, REST_BLOCK)
        inside = (tokens < num_tokens)[:, None] & (rest < DIM - 2 * HALF)[None, :]
        rest_in_qkv = qkv + (rows * num_groups * (QUERIES + OTHERS) + head) * DIM + 2 * HALF + rest[None, :]
        if place < QUERIES:
            rest_alone = queries + (rows * num_groups * QUERIES + group * QUERIES + place) * DIM + 2 * HALF + rest[None, :]
        elif place == QUERIES:
            rest_alone = keys + (rows * num_groups + group) * DIM + 2 * HALF + rest[None, :]
        else:
            rest_alone = values + (rows * num_groups + group) * DIM + 2 * HALF + rest[None, :]
        copied = tl.load(rest_alone if BACKWARD else rest_in_qkv, mask=inside, other=0.0)
        tl.store(rest_in_qkv if BACKWARD else rest_alone, copied, mask=inside)


def _norm_sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def norm(
    inputs: Tensor, added: Tensor | None, weight: Tensor, eps: float, outputs: Tensor, centered: bool
) -> tuple[Tensor, Tensor]:
    """(inputs + added, 1 / its RMS as float32 [rows]); fills `outputs` with its RMS norm times weight (`centered`: plus 1).

    inputs, added and outputs: contiguous, [..., width].
    """
    width = inputs.shape[-1]
    num_rows = inputs.numel() // width
    sums = inputs if added is None else torch.empty_like(inputs)
    inverse_rms = torch.empty(num_rows, dtype=torch.float32, device=inputs.device)
    if num_rows:
        _norm[(num_rows,)](
            inputs, added, weight, sums, outputs, inverse_rms, width, eps,
            ADD=added is not None, CENTERED=centered, **_norm_sizes(width),
        )  # fmt: skip
    return sums, inverse_rms


def norm_backward(
    sums: Tensor, weight: Tensor, inverse_rms: Tensor, grad_outputs: Tensor, grad_sums: Tensor | None, centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of both summands (they are equal) and of the weight."""
    width, num_rows = sums.shape[-1], len(inverse_rms)
    grad_inputs = torch.empty_like(sums)
    num_programs = min(num_rows, 4 * torch.cuda.get_device_properties(sums.device).multi_processor_count)
    parts = torch.empty(num_programs, width, dtype=torch.float32, device=sums.device)
    if num_rows:
        _norm_backward[(num_programs,)](
            sums, weight, inverse_rms, grad_outputs, grad_sums, grad_inputs, parts, num_rows, width,
            ADD=grad_sums is not None, CENTERED=centered, **_norm_sizes(width),
        )  # fmt: skip
    return grad_inputs, parts.sum(dim=0).to(weight.dtype)


def swiglu(gate_up: Tensor, outputs: Tensor, kind: str) -> None:
    """outputs [..., width] = activation(first half) * second half of gate_up [..., 2 * width], both contiguous."""
    width = outputs.shape[-1]
    num_rows = outputs.numel() // width
    if num_rows:
        _swiglu[(num_rows, triton.cdiv(width, _COLUMNS))](gate_up, outputs, width, KIND=kind, BLOCK=_COLUMNS, num_warps=4)


def swiglu_backward(gate_up: Tensor, grad_outputs: Tensor, kind: str) -> Tensor:
    """The gradient of gate_up."""
    width = grad_outputs.shape[-1]
    num_rows = grad_outputs.numel() // width
    gradient = torch.empty_like(gate_up)
    if num_rows:
        grid = (num_rows, triton.cdiv(width, _COLUMNS))
        _swiglu_backward[grid](gate_up, grad_outputs, gradient, width, KIND=kind, BLOCK=_COLUMNS, num_warps=4)
    return gradient


def gate(context: Tensor, gates: Tensor, outputs: Tensor) -> None:
    """outputs = context * sigmoid(gates), all [t, groups, width]; only `gates` may have strides, but for its last dimension."""
    tokens, groups, width = gates.shape
    if tokens:
        block = triton.next_power_of_2(width)
        _gate[(tokens, groups)](context, gates, outputs, width, gates.stride(0), gates.stride(1), BLOCK=block, num_warps=4)


def gate_backward(context: Tensor, gates: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of context and gates, contiguous."""
    of_context, of_gates = torch.empty_like(context), context.new_empty(gates.shape)
    tokens, groups, width = gates.shape
    if tokens:
        _gate_backward[(tokens, groups)](
            context, gates, gradients, of_context, of_gates, width, gates.stride(0), gates.stride(1),
            BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return of_context, of_gates


def rotate_heads(qkv: Tensor, tables: Tensor, queries: Tensor, keys: Tensor, values: Tensor, backward: bool = False) -> None:
    """Fill queries [t, heads, dim], keys and values [t, groups, dim] from qkv [t, groups * (heads / groups + 2) * dim].

    Queries and keys are rotated by tables, float32 [2, t, rotated / 2], or [2, 2, t, rotated / 2] of keys and of queries.
    backward: fill qkv from the others, rotating back.
    """
    num_groups = keys.shape[1]
    _launch_rotation(qkv, tables, queries, keys, values, num_groups, queries.shape[1] // num_groups, 2, backward)


def rotate(inputs: Tensor, tables: Tensor, outputs: Tensor, backward: bool = False) -> None:
    """outputs = inputs [t, heads, dim] rotated; backward: inputs from outputs, rotating back."""
    _launch_rotation(inputs, tables, outputs, outputs, outputs, 1, inputs.shape[1], 0, backward)


def _launch_rotation(
    qkv: Tensor, tables: Tensor, queries: Tensor, keys: Tensor, values: Tensor,
    num_groups: int, queries_a_group: int, others: int, backward: bool,
) -> None:  # fmt: skip
    num_tokens, dim, half = queries.shape[0], queries.shape[-1], tables.shape[-1]
    rest = dim - 2 * half
    tokens = 32
    grid = (triton.cdiv(num_tokens, tokens), num_groups * (queries_a_group + others))
    if num_tokens:
        _rotate_heads[grid](
            qkv, tables, queries, keys, values, num_tokens, num_groups, QUERIES=queries_a_group, OTHERS=others,
            DIM=dim, HALF=half, HALF_BLOCK=triton.next_power_of_2(half), REST_BLOCK=triton.next_power_of_2(rest) if rest else 0,
            TOKENS=tokens, OWN_TABLES=tables.dim() == 4, BACKWARD=backward, num_warps=4,
        )  # fmt: skip
