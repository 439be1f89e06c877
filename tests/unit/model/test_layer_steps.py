"""The steps of a layer against float64 formulas with gradients; `-m gpu` runs the same on Triton kernels."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.sft.model import cross_entropy
from megatron.sft.model.attention.flash_attention import attention_with_sinks
from megatron.sft.model.attention.packed_attention import PackedAttention
from megatron.sft.model.delta_net import steps as delta_net
from megatron.sft.model.inputs import AttentionRuns
from megatron.sft.model.norm import add_and_norm
from megatron.sft.model.rotary import rotary_tables, rotate, split_and_rotate, with_query_tables
from megatron.sft.model.swiglu import output_gate, swiglu
from megatron.sft.runtime.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rounding of results, relative to the largest value; sums over many tokens go through float32.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
T, GROUPS, QUERIES, DIM = 37, 2, 3, 16


def agree(
    function: Callable[..., tuple[Tensor, ...]],
    formula: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    slack: float = 1.0,
) -> None:
    """`function` of the inputs and `formula` of them in float64 must give the same, and the same gradients.

    slack: times the tolerance, for what rounds more than once.
    """
    mine = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    results, expected = function(*mine), formula(*exact)
    weights = [torch.randn(result.shape, dtype=result.dtype, device=result.device) for result in results]
    torch.autograd.backward(results, weights)
    torch.autograd.backward(expected, [weight.double() for weight in weights])
    pairs = list(zip(results, expected, strict=True)) + [
        (a.grad, b.grad) for a, b in zip(mine, exact, strict=True) if a.grad is not None and b.grad is not None
    ]
    assert len(pairs) == len(results) + len(inputs)
    for result, wanted in pairs:
        largest = wanted.abs().max()
        assert (result.double() - wanted).abs().max() <= slack * TOLERANCES[inputs[0].dtype] * largest, (result, wanted)


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_around_0_multiplies_by_1_more_than_its_weight(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    residual, added = (random(T, 1, 1536, dtype=dtype, device=device) for _ in range(2))
    weight = 0.3 * random(1536, dtype=dtype, device=device)
    if dtype == torch.float32:
        both = [residual, added, weight]
        agree(lambda r, a, w: add_and_norm(r, a, w, 1e-5, True), lambda r, a, w: (r + a, rms_norm(r + a, 1 + w)), both)
    agree(lambda r, w: add_and_norm(r, None, w, 1e-5, True), lambda r, w: (r.clone(), rms_norm(r, 1 + w)), [residual, weight])


def rms_norm(values: Tensor, weight: Tensor) -> Tensor:
    return weight * values / (values.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [48, 1536, 5000])
def test_the_norm_with_and_without_an_addition_is_the_formula(device: str, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    residual, added = (random(T, 1, width, dtype=dtype, device=device) for _ in range(2))
    weight = random(width, dtype=dtype, device=device)
    if dtype == torch.float32:
        agree(
            lambda r, a, w: add_and_norm(r, a, w, 1e-5), lambda r, a, w: (r + a, rms_norm(r + a, w)), [residual, added, weight]
        )
    agree(lambda r, w: add_and_norm(r, None, w, 1e-5), lambda r, w: (r.clone(), rms_norm(r, w)), [residual, weight])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [24, 3000])
def test_swiglu_is_the_formula(device: str, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    gate_up = random(T, 1, 2 * width, dtype=dtype, device=device)
    agree(lambda x: (swiglu(x),), lambda x: (F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],), [gate_up])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_geglu_and_the_clamped_swiglu_are_the_formulas(device: str, dtype: torch.dtype) -> None:
    """Gemma's, and gpt-oss's as transformers has it: both halves clamped at 7, a sigmoid of 1.702 times the gate, up + 1."""

    def geglu(gate_up: Tensor) -> tuple[Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up,)

    def clamped(gate_up: Tensor) -> tuple[Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(gate * 1.702),)

    torch.manual_seed(0)
    gate_up = 4 * random(T, 1, 2 * 3000, dtype=dtype, device=device)
    agree(lambda x: (swiglu(x, "gelu_tanh"),), geglu, [gate_up])
    agree(lambda x: (swiglu(x, "clamped_silu"),), clamped, [gate_up])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_output_gate_is_the_formula_of_a_part_of_a_larger_array(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    context = random(T, GROUPS * QUERIES * DIM, dtype=dtype, device=device)
    larger = random(T, GROUPS, (2 * QUERIES + 2) * DIM, dtype=dtype, device=device)
    part = slice(QUERIES * DIM, 2 * QUERIES * DIM)
    agree(
        lambda c, x: (output_gate(c, x[:, :, part]),), lambda c, x: (c * x[:, :, part].flatten(1).sigmoid(),), [context, larger]
    )


def turned(heads: Tensor, angles: Tensor) -> Tensor:
    """Each pair of dimensions (i, i + dim / 2) as a complex number, times e^(i angle)."""
    first, second = heads.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [16, 24])
def test_queries_and_keys_are_turned_by_their_positions_and_values_are_not(device: str, dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    positions = torch.randint(0, 50, (T,), device=device)
    frequencies = torch.rand(dim // 2, device=device)
    tables = rotary_tables(positions, frequencies)
    angles = torch.outer(positions.double(), frequencies.double())

    def formula(mixed: Tensor) -> tuple[Tensor, ...]:
        by_group = mixed.view(T, GROUPS, QUERIES + 2, dim)
        queries = by_group[:, :, :QUERIES].reshape(T, GROUPS * QUERIES, dim)
        return turned(queries, angles), turned(by_group[:, :, QUERIES], angles), by_group[:, :, QUERIES + 1].clone()

    mixed = random(T, GROUPS * (QUERIES + 2) * dim, dtype=dtype, device=device)
    agree(lambda x: split_and_rotate(x, tables, GROUPS, dim), formula, [mixed])
    heads = random(T, QUERIES, dim, dtype=dtype, device=device)
    agree(lambda x: (rotate(x, tables),), lambda x: (turned(x, angles),), [heads])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_a_part_of_each_head_is_turned_and_queries_may_grow_with_the_position(
    device: str, dtype: torch.dtype, beta: float
) -> None:
    torch.manual_seed(0)
    dim, rotated = 24, 16 if beta == 0 else 24
    positions = torch.randint(0, 50, (T,), device=device)
    frequencies = torch.rand(rotated // 2, device=device)
    tables = rotary_tables(positions, frequencies)
    if beta:
        tables = with_query_tables(tables, positions, beta, 8)
    angles = torch.outer(positions.double(), frequencies.double())
    growth = (1 + beta * torch.log(1 + (positions // 8).double()))[:, None, None]

    def formula(mixed: Tensor) -> tuple[Tensor, ...]:
        by_group = mixed.view(T, GROUPS, QUERIES + 2, dim)
        queries, keys = by_group[:, :, :QUERIES].reshape(T, GROUPS * QUERIES, dim), by_group[:, :, QUERIES]
        in_part = [torch.cat([turned(h[..., :rotated], angles), h[..., rotated:]], dim=-1) for h in (queries, keys)]
        return in_part[0] * growth, in_part[1], by_group[:, :, QUERIES + 1].clone()

    mixed = random(T, GROUPS * (QUERIES + 2) * dim, dtype=dtype, device=device)
    agree(lambda x: split_and_rotate(x, tables, GROUPS, dim), formula, [mixed])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_scaled_and_capped_logits_have_the_loss_and_gradient_of_the_formula(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, the last a short one."""

    class Alone:
        """A process group of one."""

        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 1

    monkeypatch.setattr(cross_entropy, "HEAD_CHUNK_TOKENS", 16)
    torch.manual_seed(0)
    hidden, weight = random(T, 32, dtype=dtype, device=device), random(90, 32, dtype=dtype, device=device)
    ids, weights = torch.randint(0, 80, (T,), device=device), torch.rand(T, device=device)
    targets = cross_entropy.Targets(torch.arange(T, device=device), ids, weights)
    for shape in (cross_entropy.LogitShape(0.25), cross_entropy.LogitShape(1.0, 3.0), cross_entropy.LogitShape(0.5, 2.0)):

        def ours(h: Tensor, w: Tensor, shape: cross_entropy.LogitShape = shape) -> tuple[Tensor]:
            return (cross_entropy.weighted_cross_entropy(h, w, targets, 80, Alone(), shape=shape)[0],)  # type: ignore[arg-type]

        def formula(h: Tensor, w: Tensor, shape: cross_entropy.LogitShape = shape) -> tuple[Tensor]:
            logits = shape.scale * (h @ w[:80].t())
            if shape.cap is not None:
                logits = shape.cap * torch.tanh(logits / shape.cap)
            return ((F.cross_entropy(logits, ids, reduction="none") * weights).sum(),)

        agree(ours, formula, [hidden, weight], 4.0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 9])
def test_attention_with_sinks_is_that_of_gpt_oss_in_transformers_conversation_by_conversation(
    device: str, dtype: torch.dtype, window: int | None
) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(0)
    lengths = [21, 16]
    shapes = [
        (sum(lengths), GROUPS * QUERIES, DIM),
        (sum(lengths), GROUPS, DIM),
        (sum(lengths), GROUPS, DIM),
        (GROUPS * QUERIES,),
    ]
    inputs = [random(*shape, dtype=dtype, device=device) for shape in shapes]
    steps = torch.arange(max(lengths), device=device)
    distance = steps[:, None] - steps[None]
    hidden = (distance < 0) | (distance >= (window or 99))

    def formula(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor]:
        module = SimpleNamespace(num_key_value_groups=QUERIES, sinks=sinks, training=False)
        results = []
        for q, k, v in zip(*(heads.split(lengths) for heads in (query, key, value)), strict=True):
            mask = torch.zeros(len(q), len(q), dtype=q.dtype, device=device)
            mask = mask.masked_fill(hidden[: len(q), : len(q)], torch.finfo(q.dtype).min)
            parts = (heads.transpose(0, 1)[None] for heads in (q, k, v))
            results.append(eager_attention_forward(module, *parts, mask[None, None], DIM**-0.5)[0][0])
        return (torch.cat(results).flatten(1),)

    def ours(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor]:
        reach = (-1 if window is None else window - 1, 0)
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        runs = AttentionRuns(lengths, lengths, cu_seqlens, cu_seqlens, None)
        if device == "cuda" and dtype == torch.bfloat16:
            return (attention_with_sinks(query, key, value, sinks, runs, DIM**-0.5, reach).flatten(1),)
        attention = SimpleNamespace(softmax_offset=sinks, softmax_scale=DIM**-0.5, window=reach)
        attention._mask = lambda *args, **kwargs: PackedAttention._mask(attention, *args, **kwargs)  # type: ignore[arg-type]
        return (PackedAttention._with_sinks(attention, query, key, value, runs).flatten(1),)  # type: ignore[arg-type]

    agree(ours, formula, inputs, 4.0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_gated_delta_rule_is_its_recurrence_and_conversations_do_not_share_a_state(device: str, dtype: torch.dtype) -> None:
    """Longer and shorter than the 64 tokens that are solved together; two value heads a key head."""
    try:
        delta_net.check_kernels(dtype, torch.device(device))
    except UserError as refused:
        pytest.skip(str(refused))
    torch.manual_seed(0)
    lengths, heads, dim = [150, 3, 64, 81], 2, 64 if device == "cuda" else 8
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    runs = AttentionRuns(lengths, lengths, cu_seqlens, cu_seqlens, None)
    query, key = (random(total, heads, dim, dtype=dtype, device=device) for _ in range(2))
    value = random(total, 2 * heads, dim, dtype=dtype, device=device)
    decay = -torch.rand(total, 2 * heads, device=device)
    beta = torch.rand(total, 2 * heads, device=device).to(dtype)

    def formula(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor]:
        q, k = (heads / (heads.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for heads in (q, k))
        q, k = (heads.repeat_interleave(2, dim=1) for heads in (q * dim**-0.5, k))
        outputs, starts = [], {0, *torch.tensor(lengths).cumsum(0).tolist()}
        state = v.new_zeros(2 * heads, dim, dim)
        for token in range(total):
            state = (state * 0 if token in starts else state) * g[token].exp()[:, None, None]
            correction = b[token][:, None] * (v[token] - torch.einsum("hkv,hk->hv", state, k[token]))
            state = state + torch.einsum("hk,hv->hkv", k[token], correction)
            outputs.append(torch.einsum("hkv,hk->hv", state, q[token]))
        return (torch.stack(outputs),)

    agree(
        lambda *arrays: (delta_net.delta_rule(*arrays, runs),),
        formula,
        [query, key, value, decay, beta],
        20.0 if dtype == torch.float32 else 2.0,
    )


@pytest.mark.parametrize(
    ("capability", "version", "needed"),
    [(9, "3.6.0", True), (9, "3.4.0+gitc5d671f9", True), (9, "3.7.1", False), (9, "3.3.1", False), (10, "3.6.0", False)],
)
def test_hopper_needs_tilelang_where_tritons_gradients_are_wrong(capability: int, version: str, needed: bool) -> None:
    assert delta_net.needs_tilelang(capability, version) == needed
