"""How answers are drawn from a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. Temperature 0 takes the most likely token always; top_k 0 draws from all tokens."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 64
    top_p: float = 1.0
    top_k: int = 0
