"""The models and rows that all layouts train on."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.support import pair_material, tiny

# Length, longest conversation, pairs. On a GPU float32's attention goes conversation by conversation: there they are longer.
SHORT_ROWS, LONG_ROWS = (256, 23, 128), (1024, 102, 64)
JOINED = (8, 9, 22)  # rows that the order of the data keeps together with the one before


def save_models(folder: Path, names: set[str]) -> None:
    """Four layers of a shape that every layout here can split, as converted checkpoints."""
    qwen2: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    qwen2 |= {"num_key_value_heads": 2, "vocab_size": tiny.VOCAB_SIZE, "max_position_embeddings": 2048}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    import transformers

    made = {
        "plain": ("Qwen2", {"tie_word_embeddings": True}),
        "window": ("Mistral", {"sliding_window": 24, "head_dim": 32, "tie_word_embeddings": False}),
        "experts": ("Qwen3Moe", {**experts, "head_dim": 32, "tie_word_embeddings": False}),
    }
    for name in names:
        family, changes = made[name]
        config = getattr(transformers, f"{family}Config")(**qwen2, **changes)
        tiny.save_random(getattr(transformers, f"{family}ForCausalLM")(config), folder / f"{name}_hf")
        tiny.run_module("convert", "--hf-dir", folder / f"{name}_hf", "--output", folder / name)


def save_reference(folder: Path, name: str) -> None:
    """Another model near that one, converted."""
    pair_material.save_changed(folder / f"{name}_hf", folder / f"{name}_reference_hf", by=0.02)
    tiny.run_module("convert", "--hf-dir", folder / f"{name}_reference_hf", "--output", folder / f"{name}_reference")


def rows(length: int, longest: int, num_pairs: int) -> list[list[tiny.Conversation]]:
    """Random rows of conversations of up to `longest` tokens, some of a single one, and one of `num_pairs` conversations of two
    tokens, which are shorter than context parallelism's chunks."""
    made = tiny.random_rows(40, length, longest=longest)
    random = np.random.default_rng(1)
    for number in (3, 11, 19, 27):
        tokens = random.integers(0, tiny.VOCAB_SIZE, length)
        made[number] = [(tokens[:20], tokens[20:])]
    made[5] = [(pair[:1], pair[1:]) for pair in random.integers(0, tiny.VOCAB_SIZE, (num_pairs, 2))]
    return made


def pair_rows(length: int, longest: int) -> list[list[pair_material.Pair]]:
    """Random rows of pairs, some of a single long pair, and one of pairs with answers of one or two tokens."""
    made = pair_material.random_pair_rows(40, length, longest=longest // 2)
    random = np.random.default_rng(2)
    for number in (3, 11, 19, 27):
        tokens = random.integers(0, tiny.VOCAB_SIZE, length).tolist()
        made[number] = [pair_material.Pair(tokens[:10], tokens[10 : length // 2], tokens[-length // 2 + 30 :])]
    made[5] = [pair_material.Pair(p[:1], p[1:2], p[2:]) for p in random.integers(0, tiny.VOCAB_SIZE, (length // 5, 4)).tolist()]
    return made


def write_data(folder: Path, on_cpu: bool) -> None:
    """The rows that all runs train on."""
    sizes = SHORT_ROWS if on_cpu else LONG_ROWS
    tiny.write_rows(folder / "rows", rows(*sizes), sizes[0], JOINED)
    pair_material.write_pair_rows(folder / "pairs", pair_rows(*sizes[:2]), sizes[0])
