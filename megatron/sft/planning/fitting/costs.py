"""Rough step times relative to one without the thing, to order layouts and changes of settings."""

# Communication between the GPUs that share layers, or rows, by their number.
TENSOR_COST = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.35}
CONTEXT_COST = {1: 1.0, 2: 1.08, 4: 1.15, 8: 1.25}
