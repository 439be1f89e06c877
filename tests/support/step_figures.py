"""A small architecture and the figures of one step, for tests of what a run reports."""

import torch

from megatron.sft.families.architecture import Architecture, Layer, Rope
from megatron.sft.reporting.metrics import StepMetrics

SHAPE = Architecture(
    family="qwen2",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=100,
    max_positions=64,
    norm_epsilon=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    torch_dtype=torch.float32,
    layers=(Layer(rope=Rope(theta=1e4, dim=4)),) * 2,
)
RECORD = StepMetrics(
    iteration=5,
    consumed_rows=40,
    loss=1.25,
    lr=1e-5,
    grad_norm=0.5,
    seconds=0.001,
    tokens=1000,
    trained_tokens=600,
    sum_squared_lengths=50_000,
    num_processes=2,
    memory_bytes=3 << 30,
)
