"""Adapters added to the weights under them: summed in float32, rounded once to the dtype that is written."""

from pathlib import Path

import torch
from torch import Tensor

from megatron.sft.checkpoint.adapter_record import base_checksum, refuse_adapters
from megatron.sft.checkpoint.adapter_shards import StoredAdapters
from megatron.sft.checkpoint.folder import Checkpoint, open_checkpoint
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA, adapted_weights, peft_names
from megatron.sft.runtime.errors import UserError


class Merger:
    """Adds the adapters of a checkpoint to Hugging Face's tensors, one at a time.

    It adds up what rounding takes of the adapters' effect, for `report`.
    """

    def __init__(self, stored: StoredAdapters, lora: LoRA, architecture: Architecture) -> None:
        self._stored, self._lora = stored, lora
        self._modules = {w.entry.hf[p]: w.module(p) for w in adapted_weights(architecture, lora) for p in w.projections}
        self._lost = self._whole = 0.0
        self._count = self._unchanged = 0

    def merged(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight `name` with its adapter, in `dtype`; the weight itself where it has none."""
        module = self._modules.get(name)
        if module is None:
            return weight
        down, up = (self._stored.tensor(factor) for factor in peft_names(module))
        added = (up @ down) * self._lora.scale
        exact = weight.float() + added
        result = exact.to(dtype)
        self._lost += float((result.float() - exact).square().sum())
        self._whole += float(added.square().sum())
        self._unchanged += int((result.float() == weight.float()).sum())
        self._count += added.numel()
        return result

    def report(self) -> str:
        """`merged 196 projections; …`, with the share of the adapters' effect that rounding took."""
        share = (self._lost / self._whole) ** 0.5 if self._whole else 0.0
        return (
            f"merged the adapters of {len(self._modules):,} projections: rounding changed their effect by {100 * share:.2g} % "
            f"(root mean square), and left {100 * self._unchanged / max(self._count, 1):.1f} % of the weights as they were"
        )


def base_for_merging(checkpoint: Checkpoint, given: Path | None) -> Checkpoint:
    """The checkpoint of the weights under the adapters: `given`, else where training had it. Another one is a `UserError`."""
    recorded = checkpoint.manifest["adapter"]["base"]
    path = given or Path(recorded["path"])
    if not path.is_dir():
        raise UserError(f"the adapters' base {path} does not exist: give its checkpoint with BASE=, or convert the model again")
    base = open_checkpoint(path)
    refuse_adapters(base)
    if base_checksum(base) != recorded["checksum"]:
        raise UserError(
            f"{base.path} does not hold the weights that the adapters were trained on ({recorded['path']}): give that "
            "checkpoint with BASE="
        )
    return base
