"""Rotations against transformers' ROPE_INIT_FUNCTIONS and its models, at lengths below and above the original one."""

from typing import Any

import pytest
import torch
import transformers

from megatron.sft.families.registry import read_architecture
from megatron.sft.families.rope import inverse_frequencies
from megatron.sft.model.rotary import rotary_tables

ORIGINAL, MAXIMUM = 64, 256
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 10, "max_position_embeddings": MAXIMUM, "rms_norm_eps": 1e-6,
}  # fmt: skip
PAIRS = [1.0 + 0.1 * pair for pair in range(16)]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn of no factor": {"factor": None, "original_max_position_embeddings": ORIGINAL},
    "yarn with betas": {
        "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn with mscale": {
        "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "mscale": 0.7, "mscale_all_dim": 1.2,
    },
    "yarn with an attention factor": {
        "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 0.6,
    },
    "longrope": {
        "short_factor": PAIRS, "long_factor": [3 * pair for pair in PAIRS], "original_max_position_embeddings": ORIGINAL,
    },
    "longrope with a factor": {
        "short_factor": PAIRS, "long_factor": [3 * pair for pair in PAIRS], "original_max_position_embeddings": ORIGINAL,
        "factor": 9.0,
    },
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


def tables(config: dict[str, Any], length: int) -> torch.Tensor:
    """Ours, of a conversation alone."""
    (rope,) = read_architecture(config, "config.json").ropes
    lengths = torch.full((length,), length)
    frequencies = inverse_frequencies(rope, torch.device("cpu"), lengths)
    return rotary_tables(torch.arange(length), frequencies, rope.attention_factor)


def expected(config: dict[str, Any], length: int) -> torch.Tensor:
    """transformers', from a model that has seen nothing else."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    embedding = Qwen2RotaryEmbedding(transformers.Qwen2Config(**config))
    cosine, sine = embedding(torch.zeros(1), torch.arange(length)[None])
    half = cosine.shape[-1] // 2
    return torch.stack([cosine[0, :, :half], sine[0, :, :half]])


@pytest.mark.parametrize("length", [ORIGINAL - 4, ORIGINAL, ORIGINAL + 1, MAXIMUM, MAXIMUM + 70])
@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_is_transformers_in_both_spellings_and_at_every_length(name: str, spelling: str, length: int) -> None:
    scaling = {"rope_type": name.split()[0], **SCALINGS[name]}
    if spelling == "old":
        rope: dict[str, Any] = {"rope_theta": 5e4, "rope_scaling": scaling}
    else:
        rope = {"rope_parameters": {**scaling, "rope_theta": 5e4}}
    config = {**SIZES, **rope, "model_type": "qwen2"}
    torch.testing.assert_close(tables(config, length), expected(config, length), rtol=1e-6, atol=2e-5)


def test_each_conversation_of_a_row_has_the_frequencies_of_its_length() -> None:
    for name in ("dynamic", "longrope"):
        config = {**SIZES, "rope_scaling": {"rope_type": name, **SCALINGS[name]}, "model_type": "qwen2"}
        (rope,) = read_architecture(config, "config.json").ropes
        short, long = ORIGINAL - 9, MAXIMUM + 9
        lengths = torch.cat([torch.full((length,), length) for length in (short, long)])
        positions = torch.cat([torch.arange(length) for length in (short, long)])
        row = rotary_tables(positions, inverse_frequencies(rope, torch.device("cpu"), lengths), rope.attention_factor)
        assert torch.equal(row[:, :short], tables(config, short))
        assert torch.equal(row[:, short:], tables(config, long))
        assert not torch.equal(row[:, short : 2 * short], tables(config, short))


def test_the_yarn_of_a_distilled_qwen3_is_read_as_transformers_reads_it() -> None:
    """DeepSeek-R1-0528-Qwen3-8B: `attn_factor` is a parameter that transformers does not know."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.8782}
    config = {**SIZES, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_scaling": scaling}
    architecture = read_architecture({**config, "model_type": "qwen3"}, "config.json")
    assert architecture.ropes[0].attention_factor == pytest.approx(1.1386, abs=1e-4)
    torch.testing.assert_close(tables({**config, "model_type": "qwen3"}, 90), expected(config, 90), rtol=1e-6, atol=2e-5)
