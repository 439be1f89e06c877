"""A model that answers, run by vLLM, which is imported only where BACKEND=vllm asks for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.sft.inference.decoding import Decoding
from megatron.sft.runtime.errors import UserError, first_line


@dataclass(frozen=True)
class VllmBackend:
    """See `answers.Backend`. vLLM makes its own batches and gives no token before an answer is whole."""

    engine: Any
    make_sampling: Callable[..., Any]
    stop_ids: tuple[int, ...]
    seed: int
    longest_prompt: int | None

    def generate(
        self, prompts: Sequence[list[int]], decoding: Decoding, on_token: Callable[[int], None] | None
    ) -> list[list[int]]:
        sampling = self.make_sampling(**sampling_arguments(decoding, self.stop_ids, self.seed))
        # Token ids, as vLLM would put another <s> before a text that has one.
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.engine.generate(inputs, sampling, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        if on_token:
            for token in answers[0]:
                on_token(token)
        return answers


def sampling_arguments(decoding: Decoding, stop_ids: Sequence[int], seed: int) -> dict[str, Any]:
    """What vLLM's SamplingParams takes. Its top_k of all tokens is -1."""
    return {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k or -1,
        "max_tokens": decoding.max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "seed": seed,
        "detokenize": False,
    }


def engine_arguments(folder: Path, dtype: str, seed: int, num_gpus: int) -> dict[str, Any]:
    """What vLLM's LLM takes."""
    return {
        "model": str(folder),
        "tokenizer": str(folder),
        "dtype": dtype,
        "seed": seed,
        "tensor_parallel_size": num_gpus,
        "trust_remote_code": False,
    }


def load(folder: Path, dtype: str, seed: int, num_gpus: int, stop_ids: Sequence[int]) -> VllmBackend:
    """Load to the GPUs."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(
            f"BACKEND=vllm needs the package vllm ({first_line(error)}): use a vLLM container or an environment of its own "
            "(pip install vllm brings another torch), or leave BACKEND out"
        ) from None
    engine = LLM(**engine_arguments(folder, dtype, seed, num_gpus))
    longest = int(engine.llm_engine.model_config.max_model_len) - 1
    return VllmBackend(engine, SamplingParams, tuple(stop_ids), seed, longest)
