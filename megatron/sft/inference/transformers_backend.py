"""A chat model run by transformers, on one GPU or the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.sft.hf.auto_model import loaded
from megatron.sft.inference.backends import Decoding
from megatron.sft.inference.model_folder import ModelFolder, with_adapter
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import read_json


@dataclass(frozen=True)
class TransformersBackend:
    """See `backends.Backend`."""

    model: Any
    pad_id: int

    @property
    def longest_prompt(self) -> int | None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return limit - 1 if limit else None

    def generate(
        self, prompts: Sequence[list[int]], decoding: Decoding, on_token: Callable[[int], None] | None
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        # Padded on the left, so that the answers begin in one column.  [prompts, longest]
        ids = torch.tensor([[self.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampling: dict[str, Any] = {"do_sample": bool(decoding.temperature)}
        if decoding.temperature:
            sampling |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=decoding.max_new_tokens,
                streamer=_Streamer(on_token) if on_token else None,
                **sampling,
            )
        new_ids: list[list[int]] = output[:, longest:].tolist()
        return new_ids


class _Streamer:
    """transformers calls `put` with the prompt, then with every new token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._has_begun = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_begun:
            self._on_token(int(value.reshape(-1)[0]))
        self._has_begun = True

    def end(self) -> None:
        pass


def load(folder: ModelFolder, dtype: str, seed: int, tokenizer: Any, stop_ids: Sequence[int]) -> TransformersBackend:
    """Load onto the GPU if there is one. No code from the folder is run and no network is used.

    dtype: of `chat_model.DTYPES`. `UserError` if transformers cannot load the folder.
    """
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = read_json(folder.model / "config.json", "model configuration", "export or download the model again")
        precision = dtype if dtype == "auto" else getattr(torch, dtype)
        model: Any = loaded(config, folder.model, dtype=precision, local_files_only=True)
    except Exception as error:  # for a damaged folder transformers raises errors of any type
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model {folder.model} cannot be loaded ({reason}): export or download it again") from None
    device.use_free_processors(model.num_parameters())
    if folder.adapter:
        model = with_adapter(model, folder.adapter)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    # Replaces the folder's sampling settings: answers are greedy unless a temperature is asked for.
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(stop_ids), pad_token_id=pad_id)
    return TransformersBackend(model.to(device.current()).eval(), pad_id)
