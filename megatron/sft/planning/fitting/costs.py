"""Rough step times relative to one without the thing, to order layouts and changes of settings."""

# Nothing, norms and activation functions, or whole layers computed again (docs/performance.md).
RECOMPUTE_COST = {"none": 1.0, "selective": 1.03, "full": 1.3}
# Communication between the GPUs that share layers, or rows, by their number.
TENSOR_COST = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.35}
CONTEXT_COST = {1: 1.0, 2: 1.08, 4: 1.15, 8: 1.25}
# What the whole optimizer in CPU memory adds to a step, in micro-batches' times (docs/performance.md).
OFFLOAD_MICRO_BATCHES = 5.0
