"""A merged model next to PEFT's adapter on the model that it belongs to, as transformers computes both."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from megatron.sft.checkpoint.adapter_shards import StoredAdapters
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.conversion.logits import random_conversations, transformers_logits
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA
from megatron.sft.hf.adapter_folder import write_adapter_folder
from megatron.sft.hf.auto_model import loaded, text_prefix
from megatron.sft.hf.folder import HFFolder
from megatron.sft.runtime.errors import UserError

# Bytes of weights up to which the comparison is made unless it is asked for.
_VERIFY_BYTES = 4_000_000_000
# Largest difference, as a share of the largest logit: of float32 weights, and of weights that merging rounds to 16 bits.
_TOLERANCE, _ROUNDED_TOLERANCE = 1e-4, 5e-2


def wants_comparison(verify: str, merged: Path) -> bool:
    """Whether to compare: as asked, else where the model is small and two copies in float32 fit this machine's memory."""
    if verify in ("0", "1"):
        return verify == "1"
    folder = HFFolder(merged)
    if folder.num_bytes < _VERIFY_BYTES and psutil.virtual_memory().available > 5 * folder.num_bytes:
        return True
    print(f"not compared with the adapter: {folder.num_bytes / 1e9:.1f} GB of weights (VERIFY=1 compares them)")
    return False


def compare_merged(checkpoint: Checkpoint, architecture: Architecture, lora: LoRA, hf_dir: Path, merged: Path) -> str:
    """The largest difference of logits in words; more than rounding explains is a `UserError`."""
    folder = HFFolder(merged)
    conversations = random_conversations(folder)
    ours = transformers_logits(folder, conversations)
    gc.collect()
    with tempfile.TemporaryDirectory() as name:
        stored = StoredAdapters(checkpoint)
        factors, prefix = {each: stored.tensor(each) for each in stored.names}, text_prefix(folder.config)
        write_adapter_folder(Path(name), lora, str(hf_dir), factors, prefix, architecture.moe is not None)
        theirs = _adapter_logits(hf_dir, Path(name), architecture.vocab_size, conversations)
    width = min(ours.shape[1], theirs.shape[1])
    difference, largest = (ours[:, :width] - theirs[:, :width]).abs().max().item(), theirs.abs().max().item()
    exact = all(folder.dtype_and_shape(each)[0] == torch.float32 for each in folder.tensor_names)
    if not difference <= (_TOLERANCE if exact else _ROUNDED_TOLERANCE) * max(largest, 1.0):
        raise UserError(
            f"the merged model's logits differ from the adapter's by {difference:.3g} (largest {largest:.3g}), more than "
            f"rounding explains: is {hf_dir} the model that was converted? DTYPE=fp32 merges without rounding"
        )
    same = (ours[:, :width].argmax(-1) == theirs[:, :width].argmax(-1)).float().mean().item()
    return (
        f"verified: logits as of the adapter to {difference:.2g} (largest {largest:.3g}), the same likeliest token at "
        f"{100 * same:.1f} % of the positions"
    )


def _adapter_logits(hf_dir: Path, adapter: Path, vocab_size: int, conversations: list[Any]) -> torch.Tensor:
    """PEFT's logits in float32: [tokens of all conversations, vocabulary]."""
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    base = loaded(HFFolder(hf_dir).config, hf_dir, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        parts = [model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids in conversations]
    return torch.cat(parts)[:, :vocab_size]
