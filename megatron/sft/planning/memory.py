"""How many bytes a training run needs on each GPU, part by part, worked out from the architecture before anything starts.

docs/performance.md compares the estimates with measured peaks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megatron.sft.checkpoint.moment_codes import BLOCK
from megatron.sft.families.architecture import Architecture, Layer
from megatron.sft.families.registry import layer_rules
from megatron.sft.families.rules import Buffer
from megatron.sft.families.sizes import weight_shape
from megatron.sft.families.trained import Trained
from megatron.sft.model.kept_tensors import MIXERS
from megatron.sft.model.layout import HEAD_CHUNK_TOKENS, Layout, share_of_chunk
from megatron.sft.planning.memory_phases import MemoryEstimate
from megatron.sft.planning.trained_sizes import stage_trained, unkept_inputs

GIB = 2**30
# Of a parameter whose optimizer state is in CPU memory, there, in float32: master weight, two moments, the gradient while it is
# stepped.
OFFLOADED_BYTES = 16
# Not part of torch's own peak: the CUDA context with cuBLAS' and Transformer Engine's workspaces, and NCCL's buffers
# for every dimension of parallelism.
_CONTEXT_BYTES = int(1.0 * GIB)
_NCCL_BYTES = int(0.4 * GIB)
# Blocks that torch's allocator keeps in addition to the tensors, as a share of the activations.
_FRAGMENTS = 0.02
# What RECOMPUTE=selective does not keep.
_MADE_AGAIN = frozenset(
    {"attention norm", "MLP norm", "activation", "rows of experts", "shared activation", "again query", "again key and value"}
)


@dataclass(frozen=True)
class MemorySettings:
    """What the memory depends on besides the model and the layout."""

    seq_length: int
    micro_batch_size: int = 1
    num_micro_batches: int = 1  # of a step on each data-parallel copy
    precision: str = "bf16"
    fp8_recipe: str = "tensorwise"
    recompute: str = "none"
    recompute_layers: int = 0  # of each stage, recomputed whole
    optimizer_precision: str = "fp32"
    optimizer_offload: float = 0.0  # the share of it in CPU memory
    trained: Trained = Trained()


def estimate(architecture: Architecture, layout: Layout, data_parallel: int, settings: MemorySettings) -> MemoryEstimate:
    """The estimate for the pipeline stage that needs most. Rows are taken as full and every token as trained."""
    stages = [
        _stage_estimate(architecture, layout, data_parallel, settings, stage) for stage in range(layout.pipeline_parallel)
    ]
    return max(stages, key=lambda each: each.total)


def num_parameters(architecture: Architecture) -> int:
    """Number of weights of the whole model, tied embeddings counted once."""
    embeddings = architecture.vocab_size * architecture.hidden_size * (1 if architecture.tied_embeddings else 2)
    return sum(_parameters(architecture, architecture.layers)) + embeddings + architecture.hidden_size


def stage_parameters(architecture: Architecture, layout: Layout, stage: int) -> tuple[int, int]:
    """Weights on one process of a pipeline stage: those that every data-parallel copy holds, and those of its experts."""
    split, whole, expert, whole_expert = _parameters(architecture, _stage_layers(architecture, layout, stage))
    last = layout.pipeline_parallel - 1
    embedding = layout.padded_vocab_size(architecture) // layout.tensor_parallel * architecture.hidden_size
    dense = split // layout.tensor_parallel + whole
    if stage == 0:
        dense += embedding
    if stage == last:
        dense += architecture.hidden_size  # the last norm
        if not architecture.tied_embeddings or last > 0:  # tied stages hold a copy each
            dense += embedding
    return dense, (expert // layout.expert_tensor_parallel + whole_expert) // layout.expert_parallel


def _stage_layers(architecture: Architecture, layout: Layout, stage: int) -> tuple[Layer, ...]:
    counts = layout.stage_layers(architecture)
    return architecture.layers[sum(counts[:stage]) : sum(counts[: stage + 1])]


def _parameters(architecture: Architecture, layers: Sequence[Layer]) -> tuple[int, int, int, int]:
    """Of these layers: weights that TP splits, and those that every process holds; the same of all experts together."""
    of_each = [[size * count for size in _layer_parameters(architecture, kind)] for kind, count in Counter(layers).items()]
    split, whole, expert, whole_expert = (sum(sizes) for sizes in zip(*of_each, strict=True))
    return split, whole, expert, whole_expert


def _layer_parameters(architecture: Architecture, layer: Layer) -> tuple[int, int, int, int]:
    """The four of one layer, by the family's table. Buffers do not count, as in transformers."""
    split = whole = expert = whole_expert = 0
    for rule in layer_rules(architecture, layer):
        if isinstance(rule, Buffer):
            continue
        size = prod(weight_shape(architecture, rule))
        if "{expert}" in rule.megatron:
            assert architecture.moe is not None
            size *= architecture.moe.num_experts
            expert, whole_expert = (expert, whole_expert + size) if rule.tp_dim is None else (expert + size, whole_expert)
        elif rule.tp_dim is None:
            whole += size
        else:
            split += size
    return split, whole, expert, whole_expert


def _stage_estimate(
    architecture: Architecture, layout: Layout, data_parallel: int, settings: MemorySettings, stage: int
) -> MemoryEstimate:
    dense, expert = stage_parameters(architecture, layout, stage)
    copies = data_parallel * layout.context_parallel
    expert_copies = max(1, copies * layout.tensor_parallel // (layout.expert_parallel * layout.expert_tensor_parallel))
    for_weight, for_gradient, for_optimizer, for_built = _bytes_per_parameter(settings)
    trained_dense, trained_expert = dense, expert
    if not settings.trained.everything:
        trained_dense, trained_expert = stage_trained(architecture, layout, settings.trained, stage)
    tokens = settings.seq_length * settings.micro_batch_size // layout.context_parallel
    in_flight = _micro_batches_in_flight(layout, settings.num_micro_batches, stage)
    one_micro_batch, working = _kept_and_working(architecture, layout, settings, stage)
    weights = for_weight * (dense + expert)
    if settings.trained.lora is not None:
        weights += for_weight * (trained_dense + trained_expert)
    # Two copies of the linear layers' weights in 8 bits, as rows and as columns, and of the experts'.
    split, *_ = _parameters(architecture, _stage_layers(architecture, layout, stage))
    cast = 2 * (split // layout.tensor_parallel + expert) if settings.precision == "fp8" else 0
    activations = in_flight * one_micro_batch * tokens
    working *= tokens
    unit = _element_bytes(settings)
    if stage == layout.pipeline_parallel - 1:
        # The last layer's output, its norm, its trained tokens and their gradient, on all TP ranks alike.
        activations += 4 * unit * architecture.hidden_size * tokens
        chunk = min(HEAD_CHUNK_TOKENS, tokens) * unit * layout.padded_vocab_size(architecture) // layout.tensor_parallel
        working = max(working, chunk)
    dimensions = (layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel, data_parallel)
    shares = trained_dense / copies + trained_expert / expert_copies
    largest = 4 * min(_largest_parameter(architecture, layout), shares)
    return MemoryEstimate(
        stage=stage,
        weights=int(weights) + cast,
        gradients=int(for_gradient * (trained_dense + trained_expert)),
        optimizer=int(for_optimizer * shares),
        activations=int(activations * (1 + _FRAGMENTS)),
        working=int(working),
        reserve=_CONTEXT_BYTES + _NCCL_BYTES * sum(size > 1 for size in dimensions),
        built=int(for_built * shares),
        cast=cast,
        converted=int(largest) if settings.optimizer_precision != "fp32" else 0,
    )


def _largest_parameter(architecture: Architecture, layout: Layout) -> float:
    """Elements of the largest parameter on a process: the embedding, or the first projection of an MLP or of all experts."""
    hidden, split = architecture.hidden_size, layout.tensor_parallel
    sizes = [layout.padded_vocab_size(architecture) // split * hidden, 2 * architecture.ffn_hidden_size * hidden / split]
    if architecture.moe:
        experts = architecture.moe.num_experts / (layout.expert_parallel * layout.expert_tensor_parallel)
        sizes.append(2 * architecture.moe.ffn_hidden_size * hidden * experts)
    return max(sizes)


def _kept_and_working(architecture: Architecture, layout: Layout, settings: MemorySettings, stage: int) -> tuple[float, float]:
    """Bytes a token that the stage's layers keep of a micro-batch, and the most that a layer's backward pass adds to them."""
    layers = _stage_layers(architecture, layout, stage)
    size = -(-len(layers) // layout.virtual_pipeline)  # all alike, or `check_layout` refuses the layout
    whole = [
        share_of_chunk(settings.recompute_layers, chunk, layout.virtual_pipeline) for chunk in range(layout.virtual_pipeline)
    ]
    words = ["full" if index % size < whole[index // size] else settings.recompute for index in range(len(layers))]
    keeps_8_bits = settings.precision == "fp8" and settings.fp8_recipe == "delayed"
    unneeded = unkept_inputs(architecture, settings.trained)
    kept, freed, working = 0.0, 0.0, {True: 0.0, False: 0.0}
    for (kind, word), count in Counter(zip(layers, words, strict=True)).items():
        tensors = layer_tensors(architecture, layout, settings, kind)
        if word == "selective" and keeps_8_bits:
            word = "none"
        of_layer = count * sum(kept_tensors(tensors, word, unneeded).values())
        is_whole = word == "full"
        kept, freed = kept + of_layer, freed + of_layer * (not is_whole) / layout.virtual_pipeline
        working[is_whole] = max(working[is_whole], _largest_layer_tensors(tensors, word))
    # The first layers' turn comes last, when what the others kept is free again.
    return kept, max(working[False], working[True] - freed)


def _bytes_per_parameter(settings: MemorySettings) -> tuple[int, int, float, float]:
    """(weight, gradient, optimizer, of it before the first step): the optimizer's are shared by the data-parallel copies."""
    on_gpu = 1 - settings.optimizer_offload
    if settings.precision == "fp32":
        # The weights are their own master copy, unless others are in CPU memory.
        return 4, 4, (12 if settings.optimizer_offload else 8) * on_gpu, 0
    if settings.optimizer_precision == "bf16":
        # Two moments, and the 16 bits that a master weight has more than the weight.
        return 2, 2, 6 * on_gpu, 0
    if settings.optimizer_precision == "8bit":
        # Moments of a byte, with an exponent for a block of each.
        return 2, 2, (4 + 2 / BLOCK) * on_gpu, 0
    return 2, 4, 12 * on_gpu, 4 * (not settings.optimizer_offload)


def _micro_batches_in_flight(layout: Layout, num_micro_batches: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at the same time: the first stage fills the pipeline, the last holds one.

    Interleaved stages count in chunks of the model, of which they begin more before the first backward pass.
    """
    stages, chunks = layout.pipeline_parallel, layout.virtual_pipeline
    if chunks == 1:
        return min(stages - stage, num_micro_batches)
    begun = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(begun, num_micro_batches * chunks) / chunks


def _element_bytes(settings: MemorySettings) -> int:
    return 4 if settings.precision == "fp32" else 2


def layer_tensors(architecture: Architecture, layout: Layout, settings: MemorySettings, layer: Layer) -> dict[str, float]:
    """Bytes a token of what such a layer's forward pass keeps for its backward pass, on one process.

    The norms keep their input, the linear layers theirs, the attention its query, key, value, result and logarithms of sums,
    SwiGLU its input. Under sequence parallelism what lies between the parallel parts is split over TP too.
    """
    tensor_parallel = layout.tensor_parallel
    unit = _element_bytes(settings)
    # Inputs of linear layers are kept in 8 bits, but for adapters.
    linear = 1 if settings.precision == "fp8" and settings.trained.lora is None else unit
    hidden = architecture.hidden_size / (tensor_parallel if layout.sequence_parallel else 1)
    # megatron-core has the output projection keep the 16 bits that attention keeps anyway, where the scaling allows it.
    output = linear if settings.fp8_recipe == "delayed" else unit
    tensors = {
        "layer input": unit * hidden + 4,
        "attention norm": linear * hidden,
        **MIXERS[layer.mixer](architecture, layout, unit, linear, output),
        "residual": unit * hidden + 4,
        "MLP norm": linear * hidden,
    }
    if architecture.norms == "after":
        # The layers' inputs are those of the linear layers as well.
        tensors |= {"attention norm": 0, "MLP norm": 0}
    if architecture.norms != "before":
        tensors |= {"attention output": unit * hidden + 4, "MLP output": unit * hidden + 4}
    if not layer.experts:
        width = architecture.ffn_hidden_size / tensor_parallel
        return {**tensors, "gate and up": 2 * unit * width, "activation": linear * width}
    # Each token goes to several experts, wherever they are: its row, and what they make of it, as often.
    moe = architecture.moe
    assert moe is not None
    chosen = moe.experts_per_token
    width = chosen * moe.ffn_hidden_size / layout.expert_tensor_parallel
    # Scores, the choice, and where rows come from and go to. Between processes rows cannot be made again. In fp8, too, the
    # gradients of the experts' weights are computed of 16 bits.
    routed = {"router": 12.0 * moe.num_experts + 32.0 * chosen, "MLP norm": unit * hidden}
    rows = "rows of experts" if layout.expert_parallel == 1 else "rows of other processes"
    tensors |= {**routed, rows: chosen * unit * hidden, "gate and up": 2 * unit * width, "activation": unit * width}
    if moe.shared_width:
        width = moe.shared_width / tensor_parallel
        tensors |= {"shared gate and up": 2 * unit * width, "shared activation": linear * width}
        tensors |= {"shared output": unit * hidden} if moe.shared_gate else {}
    return tensors


def kept_tensors(layer: dict[str, float], recompute: str, unneeded: frozenset[str] = frozenset()) -> dict[str, float]:
    """Those of `layer_tensors` that a layer keeps with this word for RECOMPUTE, without those that no gradient needs."""
    if recompute == "full":
        return {"layer input": layer["layer input"]}
    layer = {name: size for name, size in layer.items() if name not in unneeded}
    again = _MADE_AGAIN if recompute == "selective" else frozenset()
    if "router" in layer:
        again = again - {"MLP norm"}  # the router and the rows are made of it
    return {name: size for name, size in layer.items() if name not in again}


def _largest_layer_tensors(layer: dict[str, float], recompute: str) -> float:
    """Bytes a token that one layer's backward pass takes in addition to what is kept: gradients, and recomputed tensors."""
    gradients = layer["gate and up"] + layer["activation"] + layer["MLP norm"]
    # The gradients of experts' results and of their rows.
    gradients += 2 * max(layer.get("rows of experts", 0.0), layer.get("rows of other processes", 0.0))
    again = sum(layer.values()) - sum(kept_tensors(layer, recompute).values())
    # With latent attention the heads' gradients are more than the MLP's.
    heads = {name: size for name, size in layer.items() if name.endswith(("query", "key and value")) and "vectors" in layer}
    of_heads = sum(heads.values()) + layer["attention result"] if heads else 0.0
    if recompute == "full":
        return again + max(gradients, of_heads)
    # Norms, activation, and the heads of latent attention are computed again one at a time.
    repeated = sum(size for name, size in heads.items() if recompute == "selective" and name in _MADE_AGAIN)
    return max(gradients + min(again, layer["activation"]), of_heads + repeated)
