"""How long a training step takes in a layout: counted operations, passes over memory, and what GPUs send to each other.

The constants are fitted to measured steps on H100 and H200 GPUs (docs/performance.md, "Step time by layout"). For more GPUs
than were measured it is a prediction, and said to be one wherever it is shown.
"""

from dataclasses import dataclass, replace

from megatron.sft.families.architecture import ATTENTION, LATENT_ATTENTION, Architecture, Layer
from megatron.sft.families.flops import head_forward_flops, training_flops
from megatron.sft.model.layout import Layout
from megatron.sft.planning.memory import MemorySettings, layer_tensors, stage_parameters
from megatron.sft.planning.speed.run_time import RowLoad

MEASURED_GPUS = 4
# Operations a second of an H100 or H200 in 16 bits: the layers' products, those of experts, attention, states of gated delta
# nets, the output head.
PRODUCTS, EXPERTS, ATTENTION_PAIRS, STATES, HEAD = 680e12, 560e12, 312e12, 40e12, 595e12
# In 8 bits, casts included, relative to 16; without TensorFloat-32.
_FP8_GAIN, _FLOAT32_PRODUCTS = 1.38, 45e12
# The same of experts' results and gradients of rows.
_FP8_EXPERTS_GAIN = 1.25
# Rows are sorted, gathered and summed again: passes over them, forward and backward; gradients of experts' weights are added to
# the buffer: bytes of each.
_ROW_PASSES, _EXPERT_GRADIENT_BYTES = 12, 6
# In fp8 they are cast to 8 bits in each step, as rows and as columns: bytes of each.
_EXPERT_CAST_BYTES = 6
# Adapters add to every output and input gradient of a frozen weight.
_ADAPTED_PRODUCTS = 560e12
# Bytes kept for the backward pass, a second: norms, activation functions and rotary positions pass over them several times.
_KEPT_BYTES = 1.07e12
# Bytes of weights, gradients and states that the optimizer reads and writes, a second.
_OPTIMIZER_BYTES = 2.2e12
# OPTIMIZER_OFFLOAD, for a host with 16 cores a GPU: bytes a second between GPU and CPU in each direction, and
# within the CPU's memory, and those that a step reads and writes of a parameter: gradient, three states, new weight.
_TO_CPU, _CPU_MEMORY, _CPU_STEP_BYTES = 50e9, 46e9, 32
# Bytes a second that a GPU sends and receives: within a host, as collectives between the layers reach it and as sums of
# gradients do, and between hosts (400 Gbit/s a GPU).
_WITHIN_LAYERS, _WITHIN_GRADIENTS, BETWEEN_HOSTS = 200e9, 330e9, 40e9
# Kernels that the processor launches for a layer, forward and backward, and seconds of each: products, norms, activation
# functions and attention; sending with tensor parallelism; passing keys and values on with context parallelism; casts to 8
# bits, and exchanges of the largest values of what is gathered in them.
_LAUNCHES, _TENSOR_LAUNCHES, _CONTEXT_LAUNCHES, _FP8_LAUNCHES, _FP8_TENSOR_LAUNCHES = 65, 15, 40, 40, 8
_LAUNCH_SECONDS = 62e-6
# Attention over a part of each conversation, relative to the whole.
_CONTEXT_ATTENTION = 1.95
# Nothing, norms and activation functions, or whole layers computed again, relative to the first (docs/performance.md).
_RECOMPUTE = {"none": 1.0, "selective": 1.03, "full": 1.3}


@dataclass(frozen=True)
class Cluster:
    """gpus_per_node: GPUs that NVLink joins. between: bytes a second of a GPU to another host."""

    gpus_per_node: int = 8
    between: float = BETWEEN_HOSTS

    def bandwidth(self, span: int, within: float) -> float:
        """Of a group whose GPUs lie within `span` successive ones."""
        return within if span <= self.gpus_per_node else min(within, self.between)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they go to; those of communication are what is not hidden behind computing."""

    compute: float
    launching: float  # waiting for the processor, which launches the kernels of short rows more slowly than they run
    tensor: float
    context: float
    experts: float
    pipeline: float  # sending between stages
    bubble: float  # waiting for other stages
    data: float
    optimizer: float  # on the GPU
    offload: float = 0.0  # what OPTIMIZER_OFFLOAD adds: transfers and the CPU's step

    @property
    def total(self) -> float:
        return sum(self.__dict__.values())

    @property
    def communication(self) -> float:
        return self.tensor + self.context + self.experts + self.pipeline + self.data


def step_time(
    architecture: Architecture,
    layout: Layout,
    data_parallel: int,
    settings: MemorySettings,
    load: RowLoad,
    cluster: Cluster | None = None,
    two_heads: bool = False,
) -> StepTime:
    """Of `settings.num_micro_batches` micro-batches on each of `data_parallel` copies.

    two_heads: the output head computes every trained token twice in the forward pass, for pairs.
    Groups are laid out as megatron-core does: tensor parallelism over neighbours, then context, data, and pipeline parallelism.
    """
    cluster = cluster or Cluster()
    stages = [
        _micro_batch(architecture, layout, settings, load, cluster, stage, data_parallel, two_heads)
        for stage in range(layout.pipeline_parallel)
    ]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    times = [sum(parts.values()) for parts in stages]
    count = settings.num_micro_batches
    # The pipeline fills and empties once, in chunks of a stage.
    bubble = (sum(times) - max(times)) / layout.virtual_pipeline
    return StepTime(
        **{name: count * value for name, value in slowest.items()},
        bubble=bubble,
        data=_gradients(architecture, layout, data_parallel, settings, cluster, max(times)),
        optimizer=_optimizer(architecture, layout, data_parallel, settings),
        offload=_offload(architecture, layout, data_parallel, settings, max(times)),
    )


def recompute_cost(architecture: Architecture, layout: Layout, settings: MemorySettings) -> float:
    """The time of a step relative to one without recomputation, estimated."""
    share = min(1.0, settings.recompute_layers / max(layout.stage_layers(architecture)))
    cost = _RECOMPUTE[settings.recompute]
    return cost + share * (_RECOMPUTE["full"] - cost)


def _micro_batch(
    architecture: Architecture,
    layout: Layout,
    settings: MemorySettings,
    load: RowLoad,
    cluster: Cluster,
    stage: int,
    data_parallel: int,
    two_heads: bool,
) -> dict[str, float]:
    """Seconds of one micro-batch on one stage, forward and backward, by what they go to."""
    counts = layout.stage_layers(architecture)
    layers = architecture.layers[sum(counts[:stage]) : sum(counts[: stage + 1])]
    rows, spread = settings.micro_batch_size, layout.tensor_parallel * layout.context_parallel
    tokens, squares = rows * load.tokens, rows * load.sum_squared_lengths
    compute = _compute(replace(architecture, layers=layers, num_layers=len(layers)), layout, settings, tokens, squares)
    compute *= recompute_cost(architecture, layout, settings)
    if stage == layout.pipeline_parallel - 1:
        trained, frozen = round(rows * load.trained_tokens), settings.trained.lora is not None
        head = training_flops(replace(architecture, layers=()), 0, trained, 0, frozen)
        head += head_forward_flops(architecture, trained) if two_heads else 0.0
        compute += head / spread / HEAD
    local = tokens / layout.context_parallel
    parts = {
        "compute": compute,
        "tensor": _tensor(architecture, layout, layers, local, cluster),
        "context": _context(architecture, layout, layers, local, cluster),
        "experts": _experts(architecture, layout, layers, local, cluster),
        "pipeline": _between_stages(architecture, layout, local, cluster, data_parallel, stage),
    }
    launched = len(layers) * _launches(layout, settings) * recompute_cost(architecture, layout, settings) * _LAUNCH_SECONDS
    return {**parts, "launching": max(0.0, launched - sum(parts.values()))}


def _launches(layout: Layout, settings: MemorySettings) -> int:
    """Kernels of a dense layer for one micro-batch; experts, delta nets and adapters have more, which are not counted."""
    count, in_fp8 = _LAUNCHES, settings.precision == "fp8"
    if layout.tensor_parallel > 1:
        count += _TENSOR_LAUNCHES + (_FP8_TENSOR_LAUNCHES if in_fp8 else 0)
    if layout.context_parallel > 1:
        count += _CONTEXT_LAUNCHES
    return count + (_FP8_LAUNCHES if in_fp8 else 0)


def _compute(stage: Architecture, layout: Layout, settings: MemorySettings, tokens: float, squares: float) -> float:
    """Seconds of one micro-batch in the layers of a stage, without communication and the head."""
    spread = layout.tensor_parallel * layout.context_parallel
    frozen = settings.trained.lora is not None
    of_weight = 4 if frozen else 6
    # What differs by frozen weights is what weights take; the rest are the states of gated delta nets.
    whole, less = (training_flops(stage, round(tokens), 0, 0, each) for each in (False, True))
    weights = of_weight * (whole - less) / 2
    states = whole - 3 * (whole - less)
    pairs = training_flops(stage, 0, 0, round(squares), frozen) * (_CONTEXT_ATTENTION if layout.context_parallel > 1 else 1.0)
    kept = replace(settings, recompute="none", recompute_layers=0)
    passed = sum(sum(layer_tensors(stage, layout, kept, layer).values()) for layer in stage.layers) * tokens
    products = _product_rate(settings)
    seconds = states / spread / STATES + pairs / spread / ATTENTION_PAIRS + passed / layout.context_parallel / _KEPT_BYTES
    experts, moe = 0.0, stage.moe
    mixtures = sum(layer.experts for layer in stage.layers)
    if moe is not None and mixtures:
        rows = moe.experts_per_token * tokens
        experts = of_weight * mixtures * 3 * stage.hidden_size * moe.ffn_hidden_size * rows
        held = (
            3
            * stage.hidden_size
            * moe.ffn_hidden_size
            * moe.num_experts
            / layout.expert_parallel
            / layout.expert_tensor_parallel
        )
        seconds += mixtures * _ROW_PASSES * 2 * stage.hidden_size * rows / spread / _OPTIMIZER_BYTES
        seconds += 0 if frozen else mixtures * _EXPERT_GRADIENT_BYTES * held / _OPTIMIZER_BYTES
    return seconds + experts / spread / _expert_rate(settings) + (weights - experts) / spread / products


def _expert_rate(settings: MemorySettings) -> float:
    """Of two products of experts, of which fp8 computes both in 8 bits, and of a third for weights that are trained."""
    if settings.precision != "fp8":
        return EXPERTS
    in_16 = 1 if settings.trained.lora is None else 0
    return EXPERTS * (2 + in_16) / (2 / _FP8_EXPERTS_GAIN + in_16)


def _product_rate(settings: MemorySettings) -> float:
    if settings.precision == "fp32":
        return _FLOAT32_PRODUCTS
    rate = PRODUCTS if settings.trained.lora is None else _ADAPTED_PRODUCTS
    return rate * _FP8_GAIN if settings.precision == "fp8" else rate


def _tensor(architecture: Architecture, layout: Layout, layers: tuple[Layer, ...], tokens: float, cluster: Cluster) -> float:
    """Attention and MLP each gather their input and scatter their output, forward and backward, and gather once more for the
    weights' gradients; without sequence parallelism they sum, which sends as much."""
    size = layout.tensor_parallel
    if size == 1:
        return 0.0
    gathered = 2 * architecture.hidden_size * tokens * (size - 1) / size
    return len(layers) * 2 * 5 * gathered / cluster.bandwidth(size, _WITHIN_LAYERS)


def _context(architecture: Architecture, layout: Layout, layers: tuple[Layer, ...], tokens: float, cluster: Cluster) -> float:
    """Keys and values, or what latent attention makes them of, are gathered, their gradients summed."""
    size, latent = layout.context_parallel, architecture.latent
    attending = sum(layer.mixer in (ATTENTION, LATENT_ATTENTION) for layer in layers)
    if size == 1 or not attending:
        return 0.0
    of_token = 2 * architecture.num_kv_heads * architecture.head_dim / layout.tensor_parallel
    if latent:
        of_token = latent.kv_rank / (layout.tensor_parallel if layout.sequence_parallel else 1) + latent.rope_dim
    held = 2 * of_token * tokens
    return attending * 2 * held * (size - 1) / cluster.bandwidth(layout.tensor_parallel * size, _WITHIN_LAYERS)


def _experts(architecture: Architecture, layout: Layout, layers: tuple[Layer, ...], tokens: float, cluster: Cluster) -> float:
    """Rows go to their experts and come back, forward and backward."""
    size, moe = layout.expert_parallel, architecture.moe
    if size == 1 or moe is None:
        return 0.0
    local = tokens / (layout.tensor_parallel if layout.sequence_parallel else 1)
    sent = 2 * architecture.hidden_size * local * moe.experts_per_token * (size - 1) / size
    mixtures = sum(layer.experts for layer in layers)
    return mixtures * 4 * sent / cluster.bandwidth(size, _WITHIN_LAYERS)


def _between_stages(
    architecture: Architecture, layout: Layout, tokens: float, cluster: Cluster, data_parallel: int, stage: int
) -> float:
    """Hidden states to the next stage, and their gradients to the one before."""
    if layout.pipeline_parallel == 1:
        return 0.0
    neighbours = (stage > 0) + (stage < layout.pipeline_parallel - 1)
    sent = 2 * architecture.hidden_size * tokens / (layout.tensor_parallel if layout.sequence_parallel else 1)
    # Pipeline stages lie furthest apart.
    span = layout.tensor_parallel * layout.context_parallel * data_parallel * 2
    return layout.virtual_pipeline * neighbours * sent / cluster.bandwidth(span, _WITHIN_LAYERS)


def _gradients(
    architecture: Architecture,
    layout: Layout,
    data_parallel: int,
    settings: MemorySettings,
    cluster: Cluster,
    micro_batch: float,
) -> float:
    """Gradients are summed while the last micro-batch's backward pass runs, weights gathered while the first's forward does."""
    copies = data_parallel * layout.context_parallel
    if copies == 1 or settings.trained.lora is not None:
        return 0.0
    dense, expert = _most_parameters(architecture, layout)
    parameters = dense + (expert if layout.expert_parallel < copies * layout.tensor_parallel else 0)
    of_gradient = 2 if settings.optimizer_precision != "fp32" and settings.precision != "fp32" else 4
    speed = cluster.bandwidth(layout.tensor_parallel * copies, _WITHIN_GRADIENTS)
    moved = parameters * (copies - 1) / copies / speed
    return max(0.0, of_gradient * moved - micro_batch * 2 / 3) + max(0.0, 2 * moved - micro_batch / 3)


def _optimizer(architecture: Architecture, layout: Layout, data_parallel: int, settings: MemorySettings) -> float:
    if settings.trained.lora is not None:
        return 0.0
    dense, expert = _most_parameters(architecture, layout)
    each = {"fp32": 30, "bf16": 18, "8bit": 14}[settings.optimizer_precision]
    casts = _EXPERT_CAST_BYTES * expert if settings.precision == "fp8" else 0
    here = (1 - settings.optimizer_offload) * (dense + expert) / (data_parallel * layout.context_parallel)
    return (each * here + casts) / _OPTIMIZER_BYTES


def _offload(
    architecture: Architecture, layout: Layout, data_parallel: int, settings: MemorySettings, micro_batch: float
) -> float:
    """Gradients go to the CPU while the last micro-batch's backward pass runs. The CPU steps behind the first one's forward
    pass, which needs the embedding before it can begin; with a smaller share that is on the GPU."""
    share = settings.optimizer_offload
    if not share or settings.trained.lora is not None:
        return 0.0
    held = sum(_most_parameters(architecture, layout)) / (data_parallel * layout.context_parallel)
    embedding = layout.padded_vocab_size(architecture) * architecture.hidden_size / layout.tensor_parallel
    first = embedding / (data_parallel * layout.context_parallel) / held if share == 1 else 0.0
    stepped = share * held * max(_CPU_STEP_BYTES / _CPU_MEMORY, 2 / _TO_CPU)
    gradients = 4 * share * held / _TO_CPU
    return max(0.0, gradients - micro_batch * 2 / 3) + max(first * stepped, stepped - micro_batch / 3)


def _most_parameters(architecture: Architecture, layout: Layout) -> tuple[int, int]:
    """Weights on one process of the stage with most: outside experts, and of them."""
    return max((stage_parameters(architecture, layout, stage) for stage in range(layout.pipeline_parallel)), key=sum)
