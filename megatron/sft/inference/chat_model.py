"""A chat model that answers: a Hugging Face folder, prompted with its chat template, run by transformers or vLLM.

A control token (`<think>`, `<short>`) is put after the generation prompt: the model continues as if it had chosen it itself.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.sft.chat.conversations import Messages
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.inference.backends import Backend, Decoding
from megatron.sft.inference.model_folder import ModelFolder, open_model_folder
from megatron.sft.runtime.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Answer:
    """What the model wrote, its control token included; `finished` is False where the token limit cut it."""

    text: str
    finished: bool


@dataclass(frozen=True)
class ChatModel:
    """A model with its tokenizer. stop_ids: the tokens that end an answer."""

    tokenizer: Any
    backend: Backend
    stop_ids: tuple[int, ...]

    def prompt(self, messages: Messages, control: str = "") -> str:
        """The text that the model continues."""
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + control

    def generate(
        self, prompts: Sequence[str], decoding: Decoding, on_token: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """What the model adds to each prompt, up to a stop token. The prompts are one batch.

        Special tokens other than stop tokens stay visible. on_token: for a single prompt, is called with each new token as it
        comes. `UserError` for a prompt that is longer than the model reads.
        """
        encoded = [self.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        longest, limit = max(map(len, encoded)), self.backend.longest_prompt
        if limit and longest > limit:
            raise UserError(f"a prompt has {longest} tokens, the model reads at most {limit + 1}: shorten it")
        answers = []
        for new_ids in self.backend.generate(encoded, decoding, on_token):
            stop = next((index for index, token in enumerate(new_ids) if token in self.stop_ids), None)
            text = self.tokenizer.decode(new_ids[:stop], clean_up_tokenization_spaces=False)
            answers.append(Answer(text, stop is not None))
        return answers

    def answers(
        self,
        conversations: Sequence[Messages],
        control: str,
        decoding: Decoding,
        progress: Callable[[dict[int, Answer]], None] = lambda answers: None,
    ) -> list[Answer]:
        """Answers in the order of the conversations, each begun with `control`.

        Batches are of similar length, longest first, so that too little memory shows in the first one.
        progress: is called after each batch with its answers by the index of their conversation. `UserError` for an unknown
        control token.
        """
        check_control(self.tokenizer, control)
        prompts = [self.prompt(messages, control) for messages in conversations]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), decoding.batch_size):
            batch = order[start : start + decoding.batch_size]
            replies = self.generate([prompts[index] for index in batch], decoding)
            new = {index: Answer(control + reply.text, reply.finished) for index, reply in zip(batch, replies, strict=True)}
            answers |= new
            progress(new)
        return [answers[index] for index in range(len(prompts))]


def check_control(tokenizer: Any, control: str) -> None:
    """`UserError` unless a control text begins with an added token: a mistyped one would be read as plain text."""
    added = tokenizer.get_added_vocab()
    if control and not any(control.startswith(token) for token in added):
        known = " ".join(token for token in added if token not in tokenizer.all_special_tokens) or "none"
        raise UserError(f"control token {control!r} is not in the model's vocabulary: it has {known}")


def load_chat_model(
    folder: Path, dtype: str = "auto", backend: str = "transformers", seed: int = 1234, num_gpus: int = 1
) -> ChatModel:
    """Load a model folder, or an adapter with the model that it names. No code from the folder is run and no network is used.

    dtype: of DTYPES; auto is the folder's. backend: of BACKENDS. seed: for sampling. num_gpus: for vLLM; transformers uses one.
    """
    if backend not in BACKENDS:
        raise UserError(f"BACKEND={backend} is not known: give {' or '.join(BACKENDS)}")
    found = open_model_folder(folder)
    tokenizer = load_tokenizer(found.tokenizer)
    stop_ids = _stop_ids(tokenizer, found)
    if backend == "vllm":
        from megatron.sft.inference import vllm_backend

        return ChatModel(tokenizer, vllm_backend.load(found, dtype, seed, num_gpus, stop_ids), stop_ids)
    from megatron.sft.inference import transformers_backend

    return ChatModel(tokenizer, transformers_backend.load(found, dtype, seed, tokenizer, stop_ids), stop_ids)


def _stop_ids(tokenizer: Any, folder: ModelFolder) -> tuple[int, ...]:
    """The end tokens of model and adapter, and those that the chat template writes after an answer, which training teaches."""
    template = ChatTemplate(tokenizer)
    with contextlib.suppress(UserError):  # a template that cannot be trained with can still be used here
        template.render([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
    stop_ids = {*_eos_ids(folder.tokenizer / "generation_config.json"), *_eos_ids(folder.model / "config.json")}
    stop_ids |= {*template.end_of_turn_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    if not stop_ids:
        raise UserError(f"{tokenizer.name_or_path} names no end token: set eos_token in tokenizer_config.json")
    return tuple(sorted(stop_ids))


def _eos_ids(path: Path) -> list[int]:
    """The end tokens that a configuration names; none if it is missing or damaged, which loading the model reports."""
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]
