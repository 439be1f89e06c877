"""What the manifest of a checkpoint of adapters says of them, and of the weights that they belong to."""

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any

from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.families.lora import LoRA
from megatron.sft.runtime.errors import UserError


def lora_record(lora: LoRA, base: Checkpoint) -> dict[str, Any]:
    """What a manifest says of the adapters in a checkpoint."""
    path = os.path.abspath(base.path)  # merging may run in another folder
    base_record = {"path": path, "checksum": base_checksum(base), "trained": _is_trained(base)}
    return {**asdict(lora), "targets": list(lora.targets), "base": base_record}


def read_lora_record(checkpoint: Checkpoint) -> LoRA | None:
    """The adapters that a checkpoint consists of, None for one of a whole model."""
    record = checkpoint.manifest.get("adapter")
    if record is None:
        return None
    fields = {name: record[name] for name in ("rank", "alpha", "experts", "dropout", "rslora")}
    return LoRA(**fields, targets=tuple(record["targets"]))


def refuse_adapters(checkpoint: Checkpoint) -> None:
    """A `UserError` for a checkpoint of adapters where one of a whole model is needed."""
    if "adapter" in checkpoint.manifest:
        raise UserError(
            f"{checkpoint.path} holds adapters, not a whole model: export it with MERGE=1 scripts/5_export.sh and convert the "
            "result, or give the checkpoint of their base"
        )


def trained_base(checkpoint: Checkpoint) -> str:
    """The path of the weights under a checkpoint's adapters if they are a run's, not those of a converted model, else empty."""
    base = checkpoint.manifest["adapter"]["base"]
    return str(base["path"]) if base.get("trained") else ""


def _is_trained(checkpoint: Checkpoint) -> bool:
    """A run's, resharded or not, whose manifest says what its start was converted from."""
    return bool({"training", "trained"} & checkpoint.manifest.keys())


def base_checksum(base: Checkpoint) -> str:
    """SHA-256 that names the weights of a checkpoint: of the model that was converted, whatever the layout, or of its files."""
    source = base.manifest.get("source", {})
    if not _is_trained(base) and "weights_fingerprint" in source:
        # Conversions of one model differ in files, not in weights, except for the dtype, new rows and extended positions.
        what: Any = [source["weights_fingerprint"], base.manifest.get("hf_dtype"), source.get("config", {}).get("vocab_size")]
        what += [source["rope_extension"]] if source.get("rope_extension") else []
    else:
        what = sorted((name, file["sha256"]) for name, file in base.manifest.get("files", {}).items())
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
