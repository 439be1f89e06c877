"""A chat model run by vLLM, which is imported only if BACKEND=vllm asks for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.sft.inference.backends import Decoding
from megatron.sft.inference.model_folder import ModelFolder, adapter_rank
from megatron.sft.runtime.errors import UserError, first_line


@dataclass(frozen=True)
class VllmBackend:
    """See `backends.Backend`. vLLM forms batches itself and returns no token before an answer is complete."""

    engine: Any
    make_sampling: Callable[..., Any]
    stop_ids: tuple[int, ...]
    seed: int
    longest_prompt: int | None
    adapter: Any = None  # vLLM's request for it

    def generate(
        self, prompts: Sequence[list[int]], decoding: Decoding, on_token: Callable[[int], None] | None
    ) -> list[list[int]]:
        sampling = self.make_sampling(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k or -1,  # vLLM's way to say all tokens
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=list(self.stop_ids),
            seed=self.seed,
            detokenize=False,
        )
        # Token ids, because vLLM would put a second <s> before a text that has one.
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        options = {"lora_request": self.adapter} if self.adapter else {}
        outputs = self.engine.generate(inputs, sampling, use_tqdm=False, **options)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        if on_token:
            for token in answers[0]:
                on_token(token)
        return answers


def load(folder: ModelFolder, dtype: str, seed: int, num_gpus: int, stop_ids: Sequence[int]) -> VllmBackend:
    """Load onto `num_gpus` GPUs. `UserError` if vLLM is not installed."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(
            f"BACKEND=vllm needs the package vllm ({first_line(error)}): use a vLLM container or a separate environment "
            "(pip install vllm brings another torch), or unset BACKEND"
        ) from None
    options: dict[str, Any] = {"dtype": dtype, "seed": seed, "tensor_parallel_size": num_gpus, "trust_remote_code": False}
    request = None
    if folder.adapter:
        from vllm.lora.request import LoRARequest

        options |= {"enable_lora": True, "max_lora_rank": max(8, adapter_rank(folder.adapter))}
        request = LoRARequest(folder.adapter.name, 1, str(folder.adapter))
    engine = LLM(str(folder.model), tokenizer=str(folder.tokenizer), **options)
    longest = int(engine.llm_engine.model_config.max_model_len) - 1
    return VllmBackend(engine, SamplingParams, tuple(stop_ids), seed, longest, request)
