"""How a model is spread over processes: tensor, pipeline, context and data parallel sizes, checked against the model."""

from dataclasses import dataclass

from megatron.sft.families.architecture import Architecture
from megatron.sft.runtime.errors import UserError

# Trained tokens whose logits the output head forms at a time (see cross_entropy); here, because `plan` needs it without loading
# megatron-core. Larger chunks pass over the weight's gradient less often; this one takes 0.8 GiB of logits with 152,000 ids.
HEAD_CHUNK_TOKENS = 2816


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions of one run. The data-parallel size is what remains of the processes."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    expert_parallel: int = 1
    virtual_pipeline: int = 1  # model chunks on each pipeline stage

    def check_sizes(self) -> None:
        """A `UserError` for a size below 1, with which nothing else here can be counted."""
        for name, size in (
            ("TP", self.tensor_parallel),
            ("PP", self.pipeline_parallel),
            ("CP", self.context_parallel),
            ("EP", self.expert_parallel),
            ("VIRTUAL_PIPELINE_SIZE", self.virtual_pipeline),
        ):
            if size < 1:
                raise UserError(f"{name}={size} is not possible: parallel sizes start at 1")

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
        if num_processes // self.pipeline_parallel % self.expert_parallel:
            raise UserError(
                f"EP={self.expert_parallel} does not divide the {num_processes // self.pipeline_parallel} processes of a "
                "pipeline stage, over which experts are spread: start more processes or lower EP"
            )
        return num_processes // self.model_size

    @property
    def expert_tensor_parallel(self) -> int:
        """Processes that share one expert: those of TP, or each expert whole where EP spreads them."""
        return 1 if self.expert_parallel > 1 else self.tensor_parallel

    def padded_vocab_size(self, architecture: Architecture) -> int:
        """Rows of the embedding as Megatron holds it: the vocabulary rounded up to a multiple of the TP size."""
        return -(-architecture.vocab_size // self.tensor_parallel) * self.tensor_parallel

    def stage_layers(self, architecture: Architecture) -> list[int]:
        """Number of layers on each pipeline stage. Where they do not divide, the middle stages get the larger share."""
        stages = self.pipeline_parallel
        if architecture.num_layers % stages == 0:
            return [architecture.num_layers // stages] * stages
        middle = -(-architecture.num_layers // stages)
        while architecture.num_layers - middle * (stages - 2) < 2:
            middle -= 1
        ends = architecture.num_layers - middle * (stages - 2)
        # The last stage computes the loss as well, so it gets the smaller half.
        return [ends - ends // 2, *[middle] * (stages - 2), ends // 2]


def share_of_chunk(num_layers: int, chunk: int, num_chunks: int) -> int:
    """Of `num_layers` layers of a pipeline stage, those in one of its interleaved chunks: as many in each, the rest first."""
    return (num_layers + num_chunks - 1 - chunk) // num_chunks


def check_layout(layout: Layout, architecture: Architecture) -> None:
    """A `UserError` that names the sizes that work, if the model cannot be split as asked."""
    layout.check_sizes()
    tensor_parallel = layout.tensor_parallel
    moe = architecture.moe
    sizes = {"attention heads": architecture.num_heads, "KV heads": architecture.num_kv_heads}
    if architecture.delta_net:
        sizes["key heads of gated delta nets"] = architecture.delta_net.num_key_heads
    if moe is None or not all(layer.experts for layer in architecture.layers):
        sizes["MLP width"] = architecture.ffn_hidden_size
    if moe and layout.expert_parallel == 1:
        sizes["expert width"] = moe.ffn_hidden_size
    if moe and moe.shared_width:
        sizes["shared experts' width"] = moe.shared_width
    works = [n for n in range(1, architecture.num_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
    undivided = [f"{size} {what}" for what, size in sizes.items() if size % tensor_parallel]
    if undivided:
        raise UserError(
            f"TP={tensor_parallel} does not divide the model's {' and '.join(undivided)}: "
            f"choose TP from {', '.join(map(str, works))}"
        )
    if layout.pipeline_parallel > architecture.num_layers:
        raise UserError(
            f"PP={layout.pipeline_parallel} is more than the model's {architecture.num_layers} layers: choose PP up to that"
        )
    if architecture.delta_net and layout.context_parallel > 1:
        raise UserError(
            f"CP={layout.context_parallel} is not possible with the gated delta nets of {architecture.family}, whose state "
            "goes through the whole conversation: take CONTEXT_PARALLEL_SIZE=1, and TP with SEQUENCE_PARALLEL=1 for long rows"
        )
    _check_virtual_pipeline(layout, architecture)
    _check_experts(layout, architecture)
    if layout.sequence_parallel and tensor_parallel == 1:
        raise UserError("sequence parallelism needs TP > 1: set TENSOR_PARALLEL_SIZE=2 or more, or SEQUENCE_PARALLEL=0")


def _check_experts(layout: Layout, architecture: Architecture) -> None:
    experts = architecture.moe.num_experts if architecture.moe else 1
    if experts % layout.expert_parallel:
        raise UserError(
            f"EP={layout.expert_parallel} does not divide the model's {experts} experts: "
            f"choose EP from {', '.join(str(n) for n in range(1, experts + 1) if experts % n == 0)}"
        )


def _check_virtual_pipeline(layout: Layout, architecture: Architecture) -> None:
    """megatron-core interleaves stages that have as many layers as each other, in chunks of one size."""
    chunks, stages = layout.virtual_pipeline, layout.pipeline_parallel
    if chunks == 1:
        return
    if stages == 1:
        raise UserError(
            f"VIRTUAL_PIPELINE_SIZE={chunks} needs pipeline stages: set PIPELINE_PARALLEL_SIZE=2 or more, or take 1"
        )
    if architecture.num_layers % (stages * chunks):
        works = [n for n in range(1, architecture.num_layers + 1) if architecture.num_layers % (stages * n) == 0] or [1]
        raise UserError(
            f"VIRTUAL_PIPELINE_SIZE={chunks} x PP={stages} does not divide the model's {architecture.num_layers} layers: "
            f"choose VIRTUAL_PIPELINE_SIZE from {', '.join(map(str, works))}"
        )
