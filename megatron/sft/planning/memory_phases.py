"""The memory of a GPU part by part and phase by phase, from building the model to resuming a run."""

from dataclasses import dataclass, fields

# What a run is doing when its memory is full, in the order of a run.
PHASES = (
    "building", "first step", "forward and backward", "optimizer step", "validation", "saving", "resuming",
)  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU of the pipeline stage that needs most."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from the forward to the backward pass
    working: int  # the output head's chunk, or the largest tensors of one layer's backward pass
    reserve: int  # CUDA context and NCCL: not part of torch's own figures
    built: int = 0  # of the optimizer, before the first step
    cast: int = 0  # of the weights, their copies in 8 bits, which the first forward pass makes
    converted: int = 0  # the largest parameter's share in float32, which saving and resuming make of 16-bit states

    @property
    def tensors(self) -> int:
        """What torch.cuda.max_memory_allocated should show."""
        return max(self.phases().values())

    @property
    def total(self) -> int:
        return self.tensors + self.reserve

    @property
    def decides(self) -> str:
        """The phase that needs most."""
        phases = self.phases()
        return max(phases, key=phases.__getitem__)

    def fits(self, gpu_bytes: int) -> bool:
        """True if a GPU of `gpu_bytes` bytes holds it, with a margin of 4 %: an estimate is not exact."""
        return self.total <= 0.96 * gpu_bytes

    def parts(self) -> dict[str, int]:
        """Name and bytes of each part in the phase that decides; together they are `total`."""
        hidden = ["stage", "built", "cast", "converted"]
        copies = {}
        if self.decides in ("saving", "resuming"):
            hidden += ["activations", "working"]
            rest = self.weights + self.gradients + self.optimizer
            copies = {"copies in float32": self.tensors - rest}
        return {**{each.name: getattr(self, each.name) for each in fields(self) if each.name not in hidden}, **copies}

    def phases(self) -> dict[str, int]:
        """The most bytes of tensors in each of `PHASES`. Looking for a bad row is forward and backward again."""
        model = self.weights + self.gradients
        rest, passes = model + self.optimizer, self.activations + self.working
        sizes = (
            model + self.built - self.cast,
            model + self.built + passes,
            rest + passes,
            rest,
            rest + self.working,
            rest + self.converted,
            rest + 2 * self.converted - self.cast,
        )
        return dict(zip(PHASES, sizes, strict=True))
