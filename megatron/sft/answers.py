"""A chat model that answers: a Hugging Face folder loaded with transformers, prompted with its own chat template.

A control token (`<think>`, `<short>`) is put after the generation prompt: the model goes on as if it had chosen it itself.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.sft import device
from megatron.sft.data.chat import ChatTemplate
from megatron.sft.data.conversations import Conversation, RowReader
from megatron.sft.data.encoding import load_tokenizer
from megatron.sft.data.sources import read_rows
from megatron.sft.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Question:
    """A conversation up to the answer that is asked for, and that answer where the data has one."""

    messages: Conversation
    reference: str | None


@dataclass(frozen=True)
class Answer:
    """What the model wrote, its control token included; `finished` is False where the token limit cut it."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. Temperature 0 takes the most likely token always."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 64


@dataclass(frozen=True)
class ChatModel:
    """A model with its tokenizer. `stop_ids` end an answer."""

    tokenizer: Any
    model: Any
    stop_ids: tuple[int, ...]
    pad_id: int

    def prompt(self, messages: Conversation, control: str = "") -> str:
        """The text that the model goes on from."""
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + control

    def check_control(self, control: str) -> None:
        """A control text must begin with an added token: a mistyped one would be read as common text."""
        added = self.tokenizer.get_added_vocab()
        if control and not any(control.startswith(token) for token in added):
            known = " ".join(token for token in added if token not in self.tokenizer.all_special_tokens) or "none"
            raise UserError(f"control token {control!r} is not in the model's vocabulary: it has {known}")

    def generate(self, prompts: Sequence[str], decoding: Decoding, streamer: Any = None) -> list[tuple[str, bool]]:
        """What follows each prompt, and whether it ended by itself. The prompts are one batch, padded on the left."""
        encoded = [self.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        longest = max(map(len, encoded))
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and longest >= limit:
            raise UserError(f"a prompt has {longest} tokens, the model reads at most {limit}: shorten it")
        ids = torch.tensor([[self.pad_id] * (longest - len(each)) + each for each in encoded])  # [prompts, longest]
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in encoded])
        sampling: dict[str, Any] = {}
        if decoding.temperature:
            sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0}  # 0: of all tokens
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=decoding.max_new_tokens,
                streamer=streamer,
                **sampling,
            )
        return [self.text_of(row) for row in output[:, longest:].tolist()]

    def text_of(self, new_ids: list[int]) -> tuple[str, bool]:
        """The text before the first stop token, and whether there is one. Other special tokens stay visible."""
        stop = next((place for place, token in enumerate(new_ids) if token in self.stop_ids), None)
        return self.tokenizer.decode(new_ids[:stop], clean_up_tokenization_spaces=False), stop is not None

    def answers(
        self,
        conversations: Sequence[Conversation],
        control: str,
        decoding: Decoding,
        progress: Callable[[int], None] = lambda num_answers: None,
    ) -> list[Answer]:
        """Answers in the order of the conversations, made in batches of similar length, longest first."""
        self.check_control(control)
        prompts = [self.prompt(messages, control) for messages in conversations]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), decoding.batch_size):
            batch = order[start : start + decoding.batch_size]
            texts = self.generate([prompts[index] for index in batch], decoding)
            for index, (text, finished) in zip(batch, texts, strict=True):
                answers[index] = Answer(control + text, finished)
            progress(len(batch))
        return [answers[index] for index in range(len(prompts))]


def load_chat_model(folder: Path, dtype: str = "auto") -> ChatModel:
    """Load a model folder to the GPU if there is one. No code from the folder is run and no network is used."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: export one with scripts/5_export.sh, or mend the path")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json: give a Hugging Face model folder (scripts/5_export.sh makes one)"
        )
    tokenizer = load_tokenizer(folder)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), local_files_only=True
        )
    except Exception as error:  # transformers raises what it likes for a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model {folder} cannot be loaded ({reason}): export or download it again") from None
    stop_ids = _stop_ids(tokenizer, model.generation_config)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    # The folder's own sampling settings are put aside: answers are greedy unless a temperature is asked for.
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(stop_ids), pad_token_id=pad_id)
    return ChatModel(tokenizer, model.to(device.current()).eval(), stop_ids, pad_id)


def _stop_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """The folder's end tokens, and the one that the chat template writes after an answer, which training teaches."""
    template = ChatTemplate(tokenizer)
    with contextlib.suppress(UserError):  # a template that cannot be trained with may still be talked to
        template.render([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
    eos = generation_config.eos_token_id
    named = eos if isinstance(eos, list) else [eos]
    stop_ids = {token for token in (*named, tokenizer.eos_token_id, *template.end_of_turn_ids) if token is not None}
    if not stop_ids:
        raise UserError(f"{tokenizer.name_or_path} names no end token: set eos_token in tokenizer_config.json")
    return tuple(sorted(stop_ids))


def read_questions(path: Path, with_reference: bool) -> list[Question]:
    """The rows of a data file. A final assistant turn (or `output`) is the reference; `with_reference` asks for one."""
    reader = RowReader()
    questions = []
    for row in read_rows(path):
        try:
            questions.append(_question(reader, row.fields, with_reference))
        except UserError as error:
            raise UserError(f"{path}, line {row.line}: {error}") from None
    return questions


def _question(reader: RowReader, fields: dict[str, Any], with_reference: bool) -> Question:
    fields = dict(fields)
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        has_answer = messages[-1].get("role") == "assistant"
        if not has_answer and not with_reference:
            fields["messages"] = [*messages, {"role": "assistant", "content": "-"}]
    else:
        has_answer = "conversations" in fields or bool(fields.get("output"))
        if not has_answer and not with_reference and "instruction" in fields:
            fields["output"] = "-"
    conversation = reader.conversation(fields)
    return Question(conversation[:-1], conversation[-1]["content"] if has_answer else None)
