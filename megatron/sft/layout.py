"""How a model is spread over processes: tensor, pipeline, context and data parallel sizes, checked against the model."""

from dataclasses import dataclass

from megatron.sft.errors import UserError
from megatron.sft.families.rules import Shape


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions of one run. The data-parallel size is what remains of the processes."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    def data_parallel(self, num_processes: int) -> int:
        """Copies of the model that `num_processes` processes make; a `UserError` where they do not divide."""
        if num_processes % self.model_size:
            raise UserError(
                f"{num_processes} processes cannot hold TP {self.tensor_parallel} x PP {self.pipeline_parallel} x "
                f"CP {self.context_parallel}: start a multiple of {self.model_size} (GPUS_PER_NODE x NNODES)"
            )
        return num_processes // self.model_size

    def padded_vocab_size(self, shape: Shape) -> int:
        """Rows of the embedding as Megatron holds it: the vocabulary rounded up to a multiple of the TP size."""
        return -(-shape.vocab_size // self.tensor_parallel) * self.tensor_parallel

    def stage_layers(self, shape: Shape) -> list[int]:
        """Number of layers on each pipeline stage. Where they do not divide, the middle stages get the larger share."""
        stages = self.pipeline_parallel
        if shape.num_layers % stages == 0:
            return [shape.num_layers // stages] * stages
        middle = -(-shape.num_layers // stages)
        while shape.num_layers - middle * (stages - 2) < 2:
            middle -= 1
        ends = shape.num_layers - middle * (stages - 2)
        # The last stage computes the loss as well, so it gets the smaller half.
        return [ends - ends // 2, *[middle] * (stages - 2), ends // 2]


def check_layout(layout: Layout, shape: Shape) -> None:
    """A `UserError` that names the sizes that work, if the model cannot be split as asked."""
    for name, size in (
        ("TP", layout.tensor_parallel),
        ("PP", layout.pipeline_parallel),
        ("CP", layout.context_parallel),
    ):
        if size < 1:
            raise UserError(f"{name}={size} is not possible: parallel sizes start at 1")
    tensor_parallel = layout.tensor_parallel
    sizes = {"attention heads": shape.num_heads, "KV heads": shape.num_kv_heads, "MLP width": shape.ffn_hidden_size}
    works = [n for n in range(1, shape.num_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
    undivided = [f"{size} {what}" for what, size in sizes.items() if size % tensor_parallel]
    if undivided:
        raise UserError(
            f"TP={tensor_parallel} does not divide the model's {' and '.join(undivided)}: "
            f"choose TP from {', '.join(map(str, works))}"
        )
    if layout.pipeline_parallel > shape.num_layers:
        raise UserError(
            f"PP={layout.pipeline_parallel} is more than the model's {shape.num_layers} layers: choose PP up to that"
        )
    if layout.sequence_parallel and tensor_parallel == 1:
        raise UserError("sequence parallelism needs TP > 1: set TENSOR_PARALLEL_SIZE=2 or more, or SEQUENCE_PARALLEL=0")
