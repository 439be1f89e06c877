"""The cheapest changes of settings with which a run fits its GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.sft.families.architecture import Architecture
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.planning.fitting.costs import CONTEXT_COST, TENSOR_COST
from megatron.sft.planning.fitting.memory_fit import micro_batches
from megatron.sft.planning.fitting.recomputing import recompute_words, with_cheapest_recompute
from megatron.sft.planning.memory import MemorySettings, estimate
from megatron.sft.planning.speed.run_time import full_rows
from megatron.sft.planning.speed.step_time import recompute_cost, step_time
from megatron.sft.runtime.errors import UserError

# How much longer a step takes, or what else a change costs the user, as factors, to order them.
_ROUNDED_MOMENTS, _CPU_MEMORY, _SMALLER_MICRO_BATCH, _OTHER_DATA, _MORE_GPUS = 1.05, 1.05, 1.02, 2.0, 3.0
# Of 8 bits: after everything that costs time only, such as 16 bits with whole layers recomputed.
_COARSE_MOMENTS = 1.5
_EIGHT_BITS = "250 updates differ by 5 % together from those of fp32: docs/performance.md"
_SHOWN = 3


@dataclass(frozen=True)
class Candidate:
    """A run's settings as far as memory depends on them, perhaps after changes. cost: the factor for them.

    asked: RECOMPUTE and RECOMPUTE_LAYERS as the user has set them, which `settings` decides. words: the changes as in a shell.
    """

    architecture: Architecture
    layout: Layout
    num_gpus: int
    rows_a_step: int
    settings: MemorySettings
    asked: tuple[str, int] = ("none", 0)
    words: tuple[str, ...] = ()
    cost: float = 1.0

    @property
    def data_parallel(self) -> int:
        return self.num_gpus // self.layout.model_size

    def fits(self, gpu_bytes: int) -> bool:
        """Whether it is estimated to fit."""
        return estimate(self.architecture, self.layout, self.data_parallel, self.settings).fits(gpu_bytes)

    def changed(self, cost: float, layout: Layout | None = None, gpus: int = 0, **settings: object) -> "Candidate | None":
        """After one more change, or None if the model, the GPUs or the batch do not allow it."""
        layout, gpus = layout or self.layout, gpus or self.num_gpus
        asked = replace(self.settings, **settings)  # type: ignore[arg-type]
        try:
            check_layout(layout, self.architecture)
            copies = layout.data_parallel(gpus)
        except UserError:
            return None
        number = micro_batches(layout, copies, asked.micro_batch_size, self.rows_a_step)
        if not number:
            return None
        asked = replace(asked, num_micro_batches=number)
        return replace(self, layout=layout, num_gpus=gpus, settings=asked, cost=self.cost * cost)


def cheapest_changes(start: Candidate, gpu_bytes: int) -> list[Candidate]:
    """The changes that fit, the cheapest first: of recomputation alone, of one setting, or of two if that is too little."""
    once = [start, *_changes(start)]
    found = [each for each in (_recomputed(start, one, gpu_bytes) for one in once) if each]
    if not found:
        twice = (second for first in once[1:] for second in _changes(first))
        found = [each for each in (_recomputed(start, two, gpu_bytes) for two in twice) if each]
    found = [replace(each, words=tuple(_differences(start, each))) for each in found]
    best: dict[frozenset[str], Candidate] = {}
    for each in sorted(found, key=lambda each: (each.cost, len(each.words))):
        if each.settings.optimizer_precision == "8bit" and any(e.settings.optimizer_precision == "bf16" for e in best.values()):
            continue  # 16 bits fit at less cost
        names = frozenset(word.partition("=")[0] for word in each.words if not word.startswith("on "))
        best.setdefault(names, each)
    return [each for each in best.values() if each.words]


def changes_text(start: Candidate, gpu_bytes: int) -> str:
    """`the cheapest change that fits is A (a step takes about 1.09 times as long); or B`, or that there is none."""
    found = cheapest_changes(start, gpu_bytes)[:_SHOWN]
    if not found:
        adapters = " adapters (LORA_RANK)," if start.settings.trained.lora is None else ""
        return f"no change of one or two settings fits: take larger GPUs,{adapters} or see tools/plan"
    texts = [" ".join(each.words) for each in found]
    first = found[0]
    before = recompute_cost(start.architecture, start.layout, start.settings)
    slower = recompute_cost(first.architecture, first.layout, first.settings) / before
    slower *= _offload_cost(start, first.settings.optimizer_offload)
    note = f" (a step takes about {slower:.2f} times as long)" if slower > 1.005 else ""
    others = f"; else {', or '.join(texts[1:])}" if texts[1:] else ""
    return f"the cheapest change that fits is {texts[0]}{note}{others}"


def _recomputed(start: Candidate, one: Candidate, gpu_bytes: int) -> Candidate | None:
    """The candidate with as little recomputation as fits, if any does; what is asked for now stays where it fits."""
    if one.fits(gpu_bytes):
        return one
    settings = with_cheapest_recompute(one.architecture, one.layout, one.data_parallel, one.settings, gpu_bytes)
    again = replace(one, settings=settings)
    if not again.fits(gpu_bytes) or recompute_words(settings) == recompute_words(start.settings):
        return None
    before = recompute_cost(start.architecture, start.layout, start.settings)
    return replace(again, cost=one.cost * recompute_cost(one.architecture, one.layout, settings) / before)


def _differences(start: Candidate, end: Candidate) -> Iterator[str]:
    """What a user sets, as in a shell, so that the run at the start becomes that at the end."""
    layouts, settings = (start.layout, end.layout), (start.settings, end.settings)
    for variable, place, name in (
        ("TENSOR_PARALLEL_SIZE", layouts, "tensor_parallel"),
        ("SEQUENCE_PARALLEL", layouts, "sequence_parallel"),
        ("CONTEXT_PARALLEL_SIZE", layouts, "context_parallel"),
        ("MICRO_BATCH_SIZE", settings, "micro_batch_size"),
        ("OPTIMIZER_PRECISION", settings, "optimizer_precision"),
        ("OPTIMIZER_OFFLOAD", settings, "optimizer_offload"),
    ):
        before, after = (getattr(each, name) for each in place)
        if after != before:
            value = after if isinstance(after, str) else f"{after:g}"
            yield f"{variable}={value}" + f" ({_EIGHT_BITS})" * (after == "8bit")
    if recompute_words(end.settings) != recompute_words(start.settings):
        word, num_layers = start.asked
        if end.settings.recompute_layers:
            yield "RECOMPUTE=selective " * (word in ("full", "auto")) + recompute_words(end.settings)
        else:
            yield recompute_words(end.settings) + " RECOMPUTE_LAYERS=0" * (num_layers > 0)
    if end.settings.seq_length != start.settings.seq_length:
        yield f"rows of {end.settings.seq_length} tokens (LENGTH of scripts/3_tokenize.sh)"
    if end.num_gpus != start.num_gpus:
        yield f"{'on ' * (end.layout != start.layout)}{end.num_gpus} GPUs"


def _changes(now: Candidate) -> Iterator[Candidate]:
    """Each change of one setting that makes a GPU hold less."""
    asked, layout = now.settings, now.layout
    found: list[Candidate | None] = []
    if layout.tensor_parallel > 1 and not layout.sequence_parallel:
        found.append(now.changed(1.0, replace(layout, sequence_parallel=True)))
    if asked.micro_batch_size > 1:
        found.append(now.changed(_SMALLER_MICRO_BATCH, micro_batch_size=asked.micro_batch_size // 2))
    if asked.optimizer_precision == "fp32" and asked.precision in ("bf16", "fp8") and not asked.optimizer_offload:
        found.append(now.changed(_ROUNDED_MOMENTS, optimizer_precision="bf16"))
    if asked.optimizer_precision in ("fp32", "bf16") and asked.precision in ("bf16", "fp8") and not asked.optimizer_offload:
        found.append(now.changed(_COARSE_MOMENTS, optimizer_precision="8bit"))
    if asked.optimizer_precision == "fp32" and asked.precision != "fp32" and asked.trained.lora is None:
        for share in (share for share in (0.25, 0.5, 0.75, 1.0) if share > asked.optimizer_offload):
            cost = _CPU_MEMORY * _offload_cost(now, share)
            found.append(now.changed(cost, optimizer_offload=share))
    found += _larger_layouts(now)
    for length in (length for length in (32768, 16384, 8192, 4096, 2048, 1024) if length < asked.seq_length):
        found.append(now.changed(_OTHER_DATA * asked.seq_length / length, seq_length=length))
    return (each for each in found if each is not None)


def _offload_cost(now: Candidate, share: float) -> float:
    """How many times as long a step takes with this share of the optimizer's state in CPU memory, estimated."""
    load = full_rows(now.settings.seq_length)
    before, after = (
        step_time(now.architecture, now.layout, now.data_parallel, replace(now.settings, optimizer_offload=each), load).total
        for each in (now.settings.optimizer_offload, share)
    )
    return after / before


def _larger_layouts(now: Candidate) -> Iterator[Candidate | None]:
    layout = now.layout
    tensor, context = 2 * layout.tensor_parallel, 2 * layout.context_parallel
    layouts = []
    if tensor in TENSOR_COST:
        cost = TENSOR_COST[tensor] / TENSOR_COST.get(layout.tensor_parallel, 1.0)
        layouts.append((cost, replace(layout, tensor_parallel=tensor, sequence_parallel=True)))
    if context in CONTEXT_COST:
        cost = CONTEXT_COST[context] / CONTEXT_COST.get(layout.context_parallel, 1.0)
        layouts.append((cost, replace(layout, context_parallel=context)))
    for cost, larger in layouts:
        yield now.changed(cost, larger)
        if now.num_gpus % larger.model_size:
            yield now.changed(cost * _MORE_GPUS, larger, 2 * now.num_gpus)
    yield now.changed(_MORE_GPUS, gpus=2 * now.num_gpus)
