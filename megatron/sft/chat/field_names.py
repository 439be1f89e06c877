"""What users' data calls its roles and fields, beyond the names that chat templates know."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

# By name in small letters with underscores; `call` is a turn that holds nothing but calls of functions.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "bing", "bard"),
    "tool": (
        *("tool", "function", "observation", "ipython", "tool_response", "tool_responses", "tool_result"),
        *("tool_results", "tool_output", "function_response", "function_result", "function_output", "environment"),
    ),
    "call": ("tool_call", "tool_calls", "function_call", "function_calls"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
# In turns {role: text}, such as {"human": ..., "assistant": ...}, in the order of a conversation.
KEY_ROLES = {
    "system": ("system",),
    "user": ("user", "human", "input", "question", "query", "instruction", "prompt"),
    "tool": ("tool", "observation"),
    "assistant": ("assistant", "gpt", "bot", "chatgpt", "output", "answer", "response", "completion"),
}
_ROLE_OF_KEY = {name: role for role, names in KEY_ROLES.items() for name in names}
# Of a turn: whether it is trained, 0 or 1 (ms-swift, axolotl, OpenAI, LLaMA-Factory, slime, xtuner, torchtune).
LOSS_FIELDS: tuple[str, ...] = ("loss", "train", "training", "weight", "loss_weight", "loss_scale", "trainable")
LOSS_FIELDS += ("loss_mask", "step_loss_mask", "output_with_loss", "is_trainable", "train_on_turn", "masked")
MASKED = "masked"  # says the opposite of the others
# Parts of a turn that are trained by themselves (axolotl): no mask of ours can follow them.
DETAIL_FIELDS = ("train_detail", "training_detail")
# Of a record: 1 says nothing, anything else is refused.
RECORD_LOSS_FIELDS = (*LOSS_FIELDS[:7], "sample_weight")
REASONING_FIELDS: tuple[str, ...] = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
REASONING_FIELDS += ("thinking_content", "reasoning_text")
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
TOOLS_FIELDS = ("tools", "functions")
PREFERENCE_WORDS = {"chosen", "rejected", "preferred"}
MEDIA_FIELDS = ("image", "images", "video", "videos", "audio", "audios")

# A name that ends with one of these (`dataset_id`, `sourceURL`, `score_2`) says nothing that a conversation says.
METADATA_WORDS = set(
    """
    annotations annotator at author by categories category checksum cluster complexity config configs cost count country
    counts created creator dataset date datetime difficulties difficulty domain domains download elo email embedding
    file filename fingerprint genre guard hash hashes header helpfulness id identifier ids idx index indices ip lang
    language languages latency len length lengths level levels licence license line lines link locale logprobs md5 meta
    metadata model models moderation name num origin parent path perplexity position ppl provenance provider quality
    rank rating ratings redacted region repo revision reward rewards safety score scores seed sentiment sha sha1 sha256
    similarity site skill skills source sources split stage state status style subcategory subdomain subject subset subtask
    subtopic tag tags task tasks teacher temperature time timestamp timestamps topic topics toxic toxicity type types updated
    upvotes url urls usage uuid version versions views votes year
    """.split()  # noqa: SIM905 (a hundred words read better as text)
)
# Anywhere in the name of a number, as in `tokens` and `num_of_turns_left`; a list of that name may hold a conversation.
NUMBER_WORDS = METADATA_WORDS | {
    *("characters", "chars", "coherence", "confidence", "correctness", "downvotes", "likes", "probability", "ratio"),
    *("size", "token", "tokens", "turn", "turns", "verbosity", "words"),
}
METADATA_NAMES = {
    *("finish_reason", "finish_reasons", "stop_reason", "extra_info", "intent"),
    # Of requests to servers.
    *("parallel_tool_calls", "tool_choice", "top_p", "top_k", "stream", "n", "presence_penalty", "frequency_penalty"),
}
TRAINING_WORDS = {"loss", "mask", "masks", "train", "trained", "weight", "weights"}
PRETOKENIZED = {"input_ids", "token_ids", "label_ids"}
TRUE_OR_FALSE_WORDS = {"toxic", "redacted"}  # of METADATA_WORDS: `kto_tag: false` says that an answer is bad
# What the columns of known data sets mean, by another column that shows which data set it is.
DATASET_COLUMNS = {
    "task_category": {"knowledge", "quality_explanation"},  # Magpie
    "gen_input_configs": {"pre_query_template"},  # Magpie
    "avatarUrl": {"title", "custom_instruction", "skip_prompt_formatting"},  # OpenHermes
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def role_of(name: str) -> str | None:
    """A key of ROLES, or None for a name that is not known. `Tool Response` is `tool_response`."""
    return _ROLE_OF.get(name) or _ROLE_OF.get(_normal(name))


def role_of_key(name: str) -> str | None:
    """The role of a turn's key, where turns are {role: text}."""
    return _ROLE_OF_KEY.get(_normal(name))


def _normal(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


@lru_cache(maxsize=4096)
def words_of(name: str) -> tuple[str, ...]:
    """`sourceURL` and `source_url_2` are source and url."""
    return tuple(word.lower() for word in _WORD.findall(name) if not word.isdigit())


@lru_cache(maxsize=4096)
def is_of_preferences(name: str) -> bool:
    """Whether a field's name says that it has one side of a preference pair."""
    return not PREFERENCE_WORDS.isdisjoint(words_of(name))


def is_metadata(name: str, value: Any, names: Iterable[str]) -> bool:
    """Whether a field can say neither what is said nor what is trained. names: all fields of the record."""
    words = words_of(name)
    if TRAINING_WORDS & set(words) or name in PRETOKENIZED:
        return False
    words_allowed = TRUE_OR_FALSE_WORDS if isinstance(value, bool) else METADATA_WORDS
    if name in METADATA_NAMES or (words and words[-1] in words_allowed):
        return True
    if isinstance(value, int | float) and not isinstance(value, bool) and NUMBER_WORDS & set(words):
        return True
    return any(name in columns and marker in names for marker, columns in DATASET_COLUMNS.items())
