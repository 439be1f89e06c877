"""The files of an exported folder apart from its weights: the original model's, edited only where training changed a fact,
and README.md, the model card of a trained model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.conversion.source_record import dtype_fields, edited_config, rope_extension
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.config_fields import text_fields
from megatron.sft.families.long_context import extended_config
from megatron.sft.families.parameters import DTYPE_OPTIONS
from megatron.sft.hf.block_scales import unquantised_config
from megatron.sft.hf.folder import copy_companions, dtype_name
from megatron.sft.hf.tokenizer_files import read_chat_template
from megatron.sft.planning.objective_checks import objective_words
from megatron.sft.planning.options import options_of_record
from megatron.sft.runtime.manifest import read_json, write_json, write_text

CURVE = "loss.png"
EXTRA_TEMPLATES = "additional_chat_templates"  # of a tokenizer with several, beyond the default one
_RECIPE = (
    "train_iters", "epochs", "global_batch_size", "micro_batch_size", "seq_length", "lr", "min_lr", "lr_decay_style",
    "lr_warmup_iters", "lr_warmup_fraction", "weight_decay", "clip_grad", "precision", "loss_average", "seed",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_scaling", "lora_plus", "lora_init_from", "freeze",
)  # fmt: skip


def write_companions(
    checkpoint: Checkpoint, architecture: Architecture, hf_dir: Path, dtype: str | None, run_folder: Path, folder: Path
) -> None:
    """Copy the original's files, then write configuration, template and end-of-turn tokens as trained, and a model card.

    An untrained model's files are the original's, byte for byte. `dtype`: of the export (bf16, …), None for the original's.
    `run_folder`: where the run wrote its metrics and plot.
    """
    copy_companions(hf_dir, folder)
    if (hf_dir / EXTRA_TEMPLATES).is_dir():
        shutil.copytree(hf_dir / EXTRA_TEMPLATES, folder / EXTRA_TEMPLATES, dirs_exist_ok=True)
    _edit_config(checkpoint, architecture, dtype, folder / "config.json")
    training = checkpoint.manifest.get("training") or checkpoint.manifest.get("trained")
    if not training:
        return
    for name, key in (("default", "chat_template"), ("tool_use", "tool_use_template")):
        template = training.get(key)
        if template and template != read_named_template(folder, name):
            write_chat_template(folder, template, name)
            print(f"chat template ({name}): that of the training data, which differs from the original model's")
    _edit_end_tokens(training, folder)
    if (folder / "README.md").exists():
        (folder / "README.md").rename(folder / "README.original.md")
    curve = _find_curve(checkpoint, run_folder)
    if curve:
        (folder / CURVE).write_bytes(curve.read_bytes())
    write_text(folder / "README.md", _model_card(checkpoint, training, run_folder, hf_dir, curve is not None))


def read_named_template(folder: Path, name: str) -> str | None:
    """The template of that name, as transformers reads a folder; None if there is none."""
    if name == "default":
        return read_chat_template(folder)
    path = folder / EXTRA_TEMPLATES / f"{name}.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return None if (folder / "chat_template.jinja").is_file() else _listed(_tokenizer_config(folder)).get(name)


def write_chat_template(folder: Path, template: str, name: str = "default") -> None:
    """Write a template to where the folder has it: a file, tokenizer_config.json (alone, or in a list by name), or both."""
    path = folder / "chat_template.jinja" if name == "default" else folder / EXTRA_TEMPLATES / f"{name}.jinja"
    config = _tokenizer_config(folder)
    listed = _listed(config)
    if config is not None and ("chat_template" in config or not path.exists()):
        content: Any = template
        if listed:
            content = [{"name": key, "template": text} for key, text in (listed | {name: template}).items()]
        if listed or name == "default":
            write_json(folder / "tokenizer_config.json", {**config, "chat_template": content})
    if config is None or path.exists():
        write_text(path, template)


def _tokenizer_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "tokenizer_config.json"
    return read_json(path, "tokenizer configuration", "take the original") if path.exists() else None


def _listed(config: dict[str, Any] | None) -> dict[str, str]:
    """The templates of a tokenizer configuration that has several, by name."""
    listed = (config or {}).get("chat_template")
    return {entry["name"]: entry["template"] for entry in listed} if isinstance(listed, list) else {}


def _edit_config(checkpoint: Checkpoint, architecture: Architecture, dtype: str | None, path: Path) -> None:
    original: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = unquantised_config(original, str(path))
    if config != original:
        print("config.json: the quantization entry is gone, because the weights are not in 8 bits any more")
    extension = rope_extension(checkpoint.manifest)
    if extension:
        config = extended_config(config, extension, str(path))
        print(f"config.json: positions are extended as in the conversion, {extension.kind} by {extension.factor:g}")
    flat = {**text_fields(config), **config}
    fields = dtype_fields(flat)
    # The dtype that the export or the conversion was asked for; where the original's two fields disagree, the weights'.
    source = checkpoint.manifest.get("source", {}).get("config", {})
    converted = {**text_fields(source), **source}
    stated = {converted.get(field) for field in fields}
    wanted = stated.pop() if len(stated) == 1 else checkpoint.manifest.get("hf_dtype")
    wanted = dtype_name(DTYPE_OPTIONS[dtype]) if dtype else wanted
    differs = any(flat.get(field) != wanted for field in fields)
    edited = edited_config(config, architecture, wanted if wanted and differs else None)
    if edited == original:
        return
    write_json(path, edited)
    after = {**text_fields(edited), **edited}
    changed = [name for name in ("vocab_size", "dtype", "torch_dtype") if after.get(name) != flat.get(name)]
    if changed:
        print(f"config.json: {', '.join(f'{name} is now {after[name]}' for name in changed)}")


def _edit_end_tokens(training: dict[str, Any], folder: Path) -> None:
    """Make generation stop at the tokens that end the trained answers."""
    ends = training.get("data", {}).get("end_of_turn_ids") or []
    path = folder / "generation_config.json"
    config: dict[str, Any] = read_json(path, "generation configuration", "take the original") if path.exists() else {}
    known = config.get("eos_token_id")
    if known is None:
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = {**text_fields(model), **model}.get("eos_token_id")
    existing = [known] if isinstance(known, int) else list(known or [])
    missing = [token for token in ends if token not in existing]
    if missing:
        # The trained token first: some programs read only the first.
        tokens = [*missing, *existing]
        write_json(path, {**config, "eos_token_id": tokens[0] if len(tokens) == 1 else tokens})
        print(f"generation_config.json: generation also stops at token {', '.join(map(str, missing))}, as trained")


# What a model card calls them.
_OBJECTIVES = {
    "sft": "Supervised fine-tuning",
    "dft": "Dynamic fine-tuning",
    "dpo": "Direct preference optimization",
    "simpo": "Simple preference optimization",
    "orpo": "Odds-ratio preference optimization",
    "cpo": "Contrastive preference optimization",
}


def _find_curve(checkpoint: Checkpoint, run_folder: Path) -> Path | None:
    """The run's plot of its loss, None if it was not drawn."""
    return next((p for p in (run_folder / CURVE, checkpoint.path.parent / CURVE) if p.exists()), None)


def _model_card(checkpoint: Checkpoint, training: dict[str, Any], run_folder: Path, hf_dir: Path, curve: bool) -> str:
    """The page as Markdown, with the metadata block that model hubs read."""
    source = checkpoint.manifest.get("source", {})
    base = source.get("config", {}).get("_name_or_path") or Path(source.get("path", hf_dir)).name
    data, options = training.get("data", {}), training.get("options", {})
    adapted = "adapter" in checkpoint.manifest
    lines = ["---", f"library_name: {'peft' if adapted else 'transformers'}", "pipeline_tag: text-generation", "---", ""]
    objective = str(options.get("objective", "sft"))
    what = _OBJECTIVES.get(objective, objective) + (" with LoRA adapters" if adapted else "")
    lines += [f"# {base}, fine-tuned", "", f"{what} of `{base}` with Megatron-SFT.", ""]
    lines += ["## Data", "", f"`{Path(str(data.get('prefix', 'unknown'))).name}`", ""]
    counts = {name: data[name] for name in ("rows", "pairs", "conversations", "tokens", "trained_tokens") if name in data}
    lines += [f"- {name.replace('_', ' ')}: {value:,}" for name, value in counts.items()]
    lines += [f"- checksum (SHA-256): `{data['bin_sha256']}`"] if "bin_sha256" in data else []
    lines += ["", "## Training", "", f"- steps: {checkpoint.iteration:,} of {training.get('train_iters', 0):,}"]
    lines += [f"- rows seen: {training['consumed_rows']:,}"] if "consumed_rows" in training else []
    loss = _last_loss(checkpoint, run_folder)
    lines += [f"- loss at the last step: {loss:.4f}"] if loss is not None else []
    if objective != "sft":
        lines += [f"- objective: {objective_words(options_of_record(options))}"]
    if "reference" in training:
        lines += [f"- reference: `{Path(training['reference']['checkpoint']['path']).parent.name}`"]
    if options.get("recipe"):
        lines += [f"- recipe: `{Path(options['recipe']).name}`"]
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| {name.replace('_', '-')} | {options[name]} |" for name in _RECIPE if options.get(name) not in (None, "")]
    if curve:
        lines += ["", f"![loss]({CURVE})"]
    return "\n".join(lines) + "\n"


def _last_loss(checkpoint: Checkpoint, run_folder: Path) -> float | None:
    """The training loss that the run's metrics give for the checkpoint's step, or the nearest logged before it."""
    path = next((p for p in (run_folder / "metrics.jsonl", checkpoint.path.parent / "metrics.jsonl") if p.exists()), None)
    if path is None:
        return None
    last = None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of an interrupted run
        if "loss" in record and record.get("iteration", 0) <= checkpoint.iteration:
            last = float(record["loss"])
    return last
