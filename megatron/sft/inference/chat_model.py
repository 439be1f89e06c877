"""A chat model that answers: a Hugging Face folder, prompted with its own chat template, run by transformers or vLLM.

A control token (`<think>`, `<short>`) is put after the generation prompt: the model goes on as if it had chosen it itself.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.sft.chat.conversations import Messages
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.inference.decoding import Decoding
from megatron.sft.runtime.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Answer:
    """What the model wrote, its control token included; `finished` is False where the token limit cut it."""

    text: str
    finished: bool


class Backend(Protocol):
    """What runs the model. longest_prompt: the most tokens that it can still answer to, None where it does not say."""

    @property
    def longest_prompt(self) -> int | None: ...

    def generate(
        self, prompts: Sequence[list[int]], decoding: Decoding, on_token: Callable[[int], None] | None
    ) -> list[list[int]]:
        """What follows each prompt, a stop token and anything after it included. on_token: for a single prompt, is called
        with each new token as it comes."""


@dataclass(frozen=True)
class ChatModel:
    """A model with its tokenizer. `stop_ids` end an answer."""

    tokenizer: Any
    backend: Backend
    stop_ids: tuple[int, ...]

    def prompt(self, messages: Messages, control: str = "") -> str:
        """The text that the model goes on from."""
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + control

    def generate(
        self, prompts: Sequence[str], decoding: Decoding, on_token: Callable[[int], None] | None = None
    ) -> list[tuple[str, bool]]:
        """What follows each prompt, and whether it ended by itself. The prompts are one batch."""
        encoded = [self.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        longest, limit = max(map(len, encoded)), self.backend.longest_prompt
        if limit and longest > limit:
            raise UserError(f"a prompt has {longest} tokens, the model reads at most {limit + 1}: shorten it")
        return [self.text_of(ids) for ids in self.backend.generate(encoded, decoding, on_token)]

    def text_of(self, new_ids: list[int]) -> tuple[str, bool]:
        """The text before the first stop token, and whether there is one. Other special tokens stay visible."""
        stop = next((place for place, token in enumerate(new_ids) if token in self.stop_ids), None)
        return self.decoded(new_ids[:stop]), stop is not None

    def decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def answers(
        self,
        conversations: Sequence[Messages],
        control: str,
        decoding: Decoding,
        progress: Callable[[dict[int, Answer]], None] = lambda answers: None,
    ) -> list[Answer]:
        """Answers in the order of the conversations, made in batches of similar length, longest first.

        progress: is called after each batch with its answers by their conversation's number.
        """
        check_control(self.tokenizer, control)
        prompts = [self.prompt(messages, control) for messages in conversations]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), decoding.batch_size):
            batch = order[start : start + decoding.batch_size]
            texts = self.generate([prompts[index] for index in batch], decoding)
            new = {index: Answer(control + text, ended) for index, (text, ended) in zip(batch, texts, strict=True)}
            answers |= new
            progress(new)
        return [answers[index] for index in range(len(prompts))]


def check_control(tokenizer: Any, control: str) -> None:
    """A control text must begin with an added token: a mistyped one would be read as common text."""
    added = tokenizer.get_added_vocab()
    if control and not any(control.startswith(token) for token in added):
        known = " ".join(token for token in added if token not in tokenizer.all_special_tokens) or "none"
        raise UserError(f"control token {control!r} is not in the model's vocabulary: it has {known}")


def check_model_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: export one with scripts/5_export.sh, or mend the path")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json: give a Hugging Face model folder (scripts/5_export.sh makes one)"
        )


def load_chat_model(
    folder: Path, dtype: str = "auto", backend: str = "transformers", seed: int = 1234, num_gpus: int = 1
) -> ChatModel:
    """Load a model folder. No code from the folder is run and no network is used. num_gpus: vLLM's."""
    if backend not in BACKENDS:
        raise UserError(f"BACKEND={backend} is not known: give {' or '.join(BACKENDS)}")
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    stop_ids = _stop_ids(tokenizer, folder)
    if backend == "vllm":
        from megatron.sft.inference import vllm_backend

        return ChatModel(tokenizer, vllm_backend.load(folder, dtype, seed, num_gpus, stop_ids), stop_ids)
    from megatron.sft.inference import transformers_backend

    return ChatModel(tokenizer, transformers_backend.load(folder, dtype, seed, tokenizer, stop_ids), stop_ids)


def _stop_ids(tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """The folder's end tokens, and the one that the chat template writes after an answer, which training teaches."""
    template = ChatTemplate(tokenizer)
    with contextlib.suppress(UserError):  # a template that cannot be trained with may still be talked to
        template.render([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
    stop_ids = {*_named_in(folder / "generation_config.json"), *_named_in(folder / "config.json")}
    stop_ids |= {*template.end_of_turn_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    if not stop_ids:
        raise UserError(f"{tokenizer.name_or_path} names no end token: set eos_token in tokenizer_config.json")
    return tuple(sorted(stop_ids))


def _named_in(path: Path) -> list[int]:
    """The end tokens that a configuration names; none where it is missing or cannot be read, which loading finds itself."""
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]
