"""What an exported folder holds beside its weights: the original model's files, edited only where training changed a fact."""

import json
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.conversion.model_card import CURVE, find_curve, model_card
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.casting import NAMES
from megatron.sft.hf.folder import copy_companions, dtype_name
from megatron.sft.hf.tokenizer_files import chat_template_of
from megatron.sft.runtime.manifest import read_json, write_json, write_text


def write_companions(
    checkpoint: Checkpoint, architecture: Architecture, hf_dir: Path, dtype: str | None, run_folder: Path, folder: Path
) -> None:
    """Copy the original's files; then configuration, template and end-of-turn token as trained, and a model card.

    An untrained model's files are the original's, byte for byte. `dtype` is the one asked for, None for the original's.
    """
    copy_companions(hf_dir, folder)
    _edit_config(checkpoint, architecture, dtype, folder / "config.json")
    training = checkpoint.manifest.get("training") or checkpoint.manifest.get("trained")
    if not training:
        return
    template = training.get("chat_template")
    if template and template != chat_template_of(folder):
        write_chat_template(folder, template)
        print("chat template: the one that the model was trained with, which is not the original's")
    _edit_end_tokens(training, folder)
    if (folder / "README.md").exists():
        (folder / "README.md").rename(folder / "README.original.md")
    curve = find_curve(checkpoint, run_folder)
    if curve:
        (folder / CURVE).write_bytes(curve.read_bytes())
    write_text(folder / "README.md", model_card(checkpoint, training, run_folder, hf_dir, curve is not None))


def write_chat_template(folder: Path, template: str) -> None:
    """Write a template where the folder keeps its own: chat_template.jinja, tokenizer_config.json, or both of them."""
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path, "tokenizer configuration", "take the original") if config_path.exists() else None
    in_config = config is not None and "chat_template" in config
    if config is not None and (in_config or not (folder / "chat_template.jinja").exists()):
        write_json(config_path, {**config, "chat_template": template})
    if config is None or (folder / "chat_template.jinja").exists():
        write_text(folder / "chat_template.jinja", template)


def _edit_config(checkpoint: Checkpoint, architecture: Architecture, dtype: str | None, path: Path) -> None:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    changes: dict[str, Any] = {}
    if config["vocab_size"] != architecture.vocab_size:
        changes["vocab_size"] = architecture.vocab_size
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    # What the conversion or this export was asked for.
    converted = checkpoint.manifest.get("source", {}).get("config", {}).get(field)
    wanted = dtype_name(NAMES[dtype]) if dtype else converted
    if wanted and config.get(field) != wanted:
        changes[field] = wanted
    if changes:
        write_json(path, {**config, **changes})
        print(f"config.json: {', '.join(f'{name} is {value} now' for name, value in changes.items())}")


def _edit_end_tokens(training: dict[str, Any], folder: Path) -> None:
    """Let generation stop at the tokens that ended the trained answers."""
    ends = training.get("data", {}).get("end_of_turn_ids") or []
    path = folder / "generation_config.json"
    config: dict[str, Any] = read_json(path, "generation configuration", "take the original") if path.exists() else {}
    known = config.get("eos_token_id")
    if known is None:
        known = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    there = [known] if isinstance(known, int) else list(known or [])
    missing = [token for token in ends if token not in there]
    if missing:
        # The trained token first: some programs look at the first only.
        tokens = [*missing, *there]
        write_json(path, {**config, "eos_token_id": tokens[0] if len(tokens) == 1 else tokens})
        print(f"generation_config.json: generation also stops at token {', '.join(map(str, missing))}, as trained")
