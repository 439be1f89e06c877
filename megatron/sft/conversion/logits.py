"""Logits of a Megatron checkpoint next to transformers' for the Hugging Face folder that it comes from."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.hf.folder import HFFolder
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError

TOLERANCE = 1e-3


def random_conversations(source: HFFolder) -> list[np.ndarray]:
    """Token ids of random conversations, the same every time; one is longer than the sliding window of a tiny model."""
    generator = np.random.default_rng(1234)
    return [generator.integers(0, source.rows_on_disk, size=length) for length in (37, 1, 90)]


def compare_whole(checkpoint: checkpoint_folder.Checkpoint, source: HFFolder) -> tuple[float, float]:
    """Largest difference of logits and largest logit of the whole model in this process. `UserError` beyond TOLERANCE.

    One model is in memory at a time, in float32.
    """
    conversations = random_conversations(source)
    theirs = transformers_logits(source, conversations)
    gc.collect()
    with process_groups.parallel(Layout()):
        ours = megatron_logits(checkpoint, source, Layout(), conversations)
    assert ours is not None
    return difference_of(ours, theirs, TOLERANCE)


def difference_of(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> tuple[float, float]:
    """Largest difference and largest logit; a difference that is not `within` the tolerance is a `UserError`."""
    ours = ours[:, : theirs.shape[1]]  # without rows that were added to the vocabulary
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not within(difference, largest, tolerance):
        raise UserError(
            f"logits differ from transformers' by {difference:.3g} (largest {largest:.3g}), more than the tolerance "
            f"{tolerance:.3g}: tools/compare_logits shows the layer where it starts"
        )
    return difference, largest


def within(difference: float, largest: float, tolerance: float) -> bool:
    """Whether the difference is small enough: `tolerance` for logits up to 10, in proportion above. False for NaN."""
    return difference <= tolerance * max(1.0, largest / 10)


def layer_table(checkpoint: checkpoint_folder.Checkpoint, source: HFFolder, conversations: list[np.ndarray]) -> str:
    """Differences of the hidden states after each layer, a line per layer, for the whole model in one process."""
    ours: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    megatron_logits(checkpoint, source, Layout(), conversations, hidden=ours)
    transformers_logits(source, conversations, hidden=theirs)
    lines = ["layer  largest difference  largest value"]
    per_layer = len(ours)
    for index, state in enumerate(ours):
        # transformers runs the layers once for each conversation.
        other = torch.cat(theirs[index::per_layer])
        difference = (state[: len(other)] - other).abs().max().item()
        lines.append(f"{index:5d}  {difference:18.3g}  {other.abs().max().item():13.3g}")
    return "\n".join(lines)


def _keep_output(kept: list[torch.Tensor]) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden.detach().float().reshape(-1, hidden.shape[-1]))

    return hook


def megatron_logits(
    checkpoint: checkpoint_folder.Checkpoint,
    source: HFFolder,
    layout: Layout,
    conversations: list[np.ndarray],
    hidden: list[torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """[tokens of all conversations, vocabulary] in float32 on one process of the last pipeline stage, None elsewhere.

    `hidden`: if given, the output of each layer is appended, [tokens, hidden size] in float32.
    """
    from megatron.core import parallel_state

    from megatron.sft.checkpoint.model_shards import load_weights
    from megatron.sft.data.tokenized import Row
    from megatron.sft.model.config import transformer_config
    from megatron.sft.model.gpt import build_model
    from megatron.sft.model.inputs import MicroBatch
    from megatron.sft.model.pipeline import run_schedule
    from megatron.sft.training.batches import make_micro_batch

    model = build_model(source.architecture, layout, transformer_config(source.architecture, layout))
    load_weights(checkpoint, [model], layout)
    model.eval()
    if hidden is not None:
        for layer in model.decoder.layers:
            layer.register_forward_hook(_keep_output(hidden))
    tokens = np.concatenate(conversations)
    row = Row(tokens, np.zeros(len(tokens), dtype=bool), np.array([len(c) for c in conversations]))
    batch = make_micro_batch([row], layout.tensor_parallel, "token", device.current())

    def forward_step(batches: Iterator[MicroBatch], stage: Any) -> tuple[torch.Tensor, Any]:
        return stage(batch=next(batches), logits=True), lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = run_schedule([model], [batch], forward_step, forward_only=True, collect_non_loss_data=True)
    if not parallel_state.is_pipeline_last_stage() or parallel_state.get_tensor_model_parallel_rank() != 0:
        return None
    logits: torch.Tensor = outputs[0][: len(tokens)].float().cpu()
    return logits


def transformers_logits(
    source: HFFolder, conversations: list[np.ndarray], hidden: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits of transformers in float32, each conversation by itself: [tokens of all conversations, vocabulary]."""
    import transformers

    from megatron.sft.hf.auto_model import loaded

    transformers.utils.logging.disable_progress_bar()
    model = loaded(source.config, source.path, stated=source.extension is not None, dtype=torch.float32).eval()
    device.use_free_processors(model.num_parameters())
    if hidden is not None:
        for layer in getattr(model.model, "language_model", model.model).layers:
            layer.register_forward_hook(_keep_output(hidden))
    with torch.no_grad():
        parts = [model(torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids in conversations]
    return torch.cat(parts)
