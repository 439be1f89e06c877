"""What runs a chat model, and how answers are drawn: the interface of transformers_backend and vllm_backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. temperature: 0 always takes the most likely token. top_k: 0 draws from all tokens."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 64
    top_p: float = 1.0
    top_k: int = 0


class Backend(Protocol):
    """Runs a loaded model. longest_prompt: in tokens, with room for one token of the answer; None if there is no limit."""

    @property
    def longest_prompt(self) -> int | None: ...

    def generate(
        self, prompts: Sequence[list[int]], decoding: Decoding, on_token: Callable[[int], None] | None
    ) -> list[list[int]]:
        """The new token ids of each prompt, up to and with a stop token, possibly padded after it; the prompts are one batch.

        on_token: for a single prompt, is called with each new token as it comes.
        """
