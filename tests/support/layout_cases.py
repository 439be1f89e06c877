"""What is trained in every parallel layout, the layouts, and what became of each run."""

from dataclasses import dataclass, field

UNDECIDED = 5e-6  # of router logits, which differ by as much between layouts after a few steps in float32
FEW_TOKENS = 2e-3  # the most that a loss then changes


@dataclass(frozen=True)
class Variant:
    """What is trained; every layout of a variant must give the losses of one process. engine: Transformer Engine, if there.
    objective: settings of one that is trained on pairs, against another model as the reference.
    """

    name: str
    tolerance: float
    precision: str = "fp32"
    model: str = "plain"
    average: str = "token"
    engine: bool = False
    objective: str = ""


@dataclass(frozen=True)
class Layout:
    """Parallel sizes by their options' names; what is left of the processes is data parallel."""

    name: str
    processes: int
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def options(self) -> list[str]:
        return [word for name, size in self.sizes.items() for word in ("--" + name.replace("_", "-"), str(size))]


ONE = Layout("one", 1)
_TP, _PP, _CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
_VPP, _SP, _EP = "num_virtual_stages_per_pipeline_rank", "sequence_parallel", "expert_model_parallel_size"
TWO = [
    Layout("TP2", 2, {_TP: 2}),
    Layout("PP2", 2, {_PP: 2}),
    Layout("CP2", 2, {_CP: 2}),
    Layout("DP2", 2),
    Layout("TP2 + SP", 2, {_TP: 2, _SP: 1}),
    Layout("PP2 x VPP2", 2, {_PP: 2, _VPP: 2}),
    Layout("EP2", 2, {_EP: 2}),
]
FOUR = [
    Layout("CP2 x TP2 + SP", 4, {_CP: 2, _TP: 2, _SP: 1}),
    Layout("CP2 x PP2", 4, {_CP: 2, _PP: 2}),
    Layout("CP2 x DP2", 4, {_CP: 2}),
    Layout("CP4", 4, {_CP: 4}),
    Layout("CP2 x PP2 x VPP2", 4, {_CP: 2, _PP: 2, _VPP: 2}),
    Layout("PP4", 4, {_PP: 4}),
    Layout("TP2 x PP2", 4, {_TP: 2, _PP: 2}),
]
# Every part of the mechanism: a reference, an SFT part, places of tokens in their answers, numbers of tokens.
DPO = "--objective dpo --dpo-loss sigmoid_norm --dpo-beta 2 --sft-weight 0.3 --dpo-ld-alpha 0.5"
EXACT = Variant("fp32", 1e-6)
ON_CPU = [
    EXACT,
    Variant("fp32, by conversation", 1e-6, average="conversation"),
    Variant("fp32, window", 1e-6, model="window"),
    Variant("fp32, experts", 1e-6, model="experts"),
    Variant("pairs", 1e-6, objective=DPO),
    Variant("pairs, window", 1e-6, model="window", objective="--objective orpo"),
    Variant("pairs, experts", 1e-6, model="experts", objective=DPO),
    Variant("pairs, adapters", 1e-6, objective=f"{DPO} --lora-rank 4"),
]
ON_GPU = [
    Variant("bf16", 1e-2, precision="bf16"),
    Variant("bf16 with TE", 1e-2, precision="bf16", engine=True),
    Variant("fp32", 1e-4),
    Variant("fp32 with TE", 1e-4, engine=True),
    Variant("bf16, window, with TE", 1e-2, precision="bf16", model="window", engine=True),
    Variant("bf16, experts, with TE", 1e-2, precision="bf16", model="experts", engine=True),
    Variant("fp32, pairs", 1e-4, objective=DPO),
    Variant("bf16, pairs, with TE", 1e-2, precision="bf16", engine=True, objective=DPO),
]


def fits(variant: Variant, layout: Layout) -> bool:
    """Whether a variant is trained in a layout."""
    # Under TP experts get sequence parallelism by themselves.
    if variant.model == "experts":
        return _TP not in layout.sizes or _SP in layout.sizes
    return _EP not in layout.sizes


@dataclass
class Run:
    """One variant in one layout, and what became of it: losses and gradient norms by step, and the validation loss.

    margins: of experts in one process, by step: how much better the last chosen expert of any token was than the next one.
    """

    variant: Variant
    layout: Layout
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    validation: float = 0.0

    def differences(self, reference: "Run") -> list[float]:
        """Relative ones of the losses, the validation's last."""
        return _relative([*self.losses, self.validation], [*reference.losses, reference.validation])

    def undecided(self, reference: "Run") -> int | None:
        """The first step that differs, if rounding chose a token's experts there or just before: no later loss can be equal."""
        differences = self.differences(reference)
        first = next((i for i, found in enumerate(differences) if found > self.variant.tolerance), None)
        # The first step begins with equal weights, and is never excused.
        if not first or max(differences) > FEW_TOKENS:
            return None
        return first if min(reference.margins[first - 1 : first + 1], default=1.0) <= UNDECIDED else None

    def difference(self, reference: "Run") -> float:
        """The largest relative difference of a loss, up to where experts are chosen by rounding."""
        return max(self.differences(reference)[: self.undecided(reference)], default=0.0)

    def norm_difference(self, reference: "Run") -> float:
        """Of gradient norms, likewise."""
        return max(_relative(self.norms, reference.norms)[: self.undecided(reference)], default=0.0)


def _relative(ours: list[float], theirs: list[float]) -> list[float]:
    assert len(ours) == len(theirs) > 1
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
