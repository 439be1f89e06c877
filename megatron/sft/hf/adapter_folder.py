"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors with A and B of every adapted module in float32.

Adapters are read only where they mean what ours mean: plain LoRA of one rank and scale on linear layers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import PEFT_PREFIX, LoRA, chosen_targets, factor_shapes, kind_of, peft_names
from megatron.sft.families.weight_names import weight_entries
from megatron.sft.hf.names import ADAPTER_CONFIG as CONFIG
from megatron.sft.hf.names import ADAPTER_WEIGHTS as WEIGHTS
from megatron.sft.hf.safetensors_file import SafetensorsFile, write_file
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import read_json, write_json

# What the modules of a text model begin with in a model with other parts too, in transformers 5 and before; "model." in ours.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
# Fields of adapter_config.json that are used, that say nothing about the result, or that may have one value only.
_USED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "base_model_name_or_path", "peft_type"}
_WITHOUT_MEANING = {
    "auto_mapping", "revision", "inference_mode", "task_type", "peft_version", "ephemeral_gpu_offload", "megatron_config",
    "megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "corda_config", "eva_config", "arrow_config",
    "layers_pattern",
}  # fmt: skip
_ALLOWED: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


class AdapterFolder:
    """An adapter in PEFT's format. One that is not plain LoRA, or lacks a file, is a `UserError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} has no {CONFIG}: give a folder that PEFT or scripts/5_export.sh wrote")
        self.config: dict[str, Any] = read_json(path / CONFIG, "adapter configuration", "take another copy of the adapter")
        if not isinstance(self.config, dict) or self.config.get("peft_type") != "LORA":
            kind = self.config.get("peft_type") if isinstance(self.config, dict) else None
            raise UserError(f"{path / CONFIG} has peft_type {kind!r}: only LORA adapters are read")
        self._check_config()
        if not (path / WEIGHTS).is_file():
            old = " (adapter_model.bin, a pickle, is not read: save it again with safetensors)"
            there = old if (path / "adapter_model.bin").exists() else ""
            raise UserError(f"{path} has no {WEIGHTS}{there}: take a whole copy of the adapter")
        self._file = SafetensorsFile(path / WEIGHTS)
        self._on_disk = {_without_other_parts(name): name for name in self._file.entries}

    def _check_config(self) -> None:
        for name, value in self.config.items():
            if name in _USED or name in _WITHOUT_MEANING or not value or value in _ALLOWED.get(name, ()):
                continue
            if name == "target_parameters" and all(str(each).endswith(".weight") for each in value):
                continue  # of linear layers, as `write_adapter_folder` names them
            advice = (
                "merge it with PEFT's merge_and_unload and convert the result" if name != "use_dora" else "DoRA is not built"
            )
            raise UserError(
                f"{self.path / CONFIG} has {name} {value!r}, which is not plain LoRA of one rank and scale: {advice}"
            )
        config, rank = self.path / CONFIG, self.config.get("r")
        if type(rank) is not int or rank < 1:
            raise UserError(f"{config} has r {rank!r}: a rank is a whole number above 0, take another copy of the adapter")
        for name, least in (("lora_alpha", 0.0), ("lora_dropout", -1.0)):
            value = self.config.get(name, 0.0)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= least:
                raise UserError(f"{config} has {name} {value!r}, which is not usable: take another copy of the adapter")

    def lora(self, architecture: Architecture) -> LoRA:
        """Rank, scale and targets, which must be the same in every layer. An adapter of another model is a `UserError`."""
        modules = {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in self._on_disk}
        known = {name.removesuffix(".weight"): entry for entry in weight_entries(architecture) for name in entry.hf}
        for module in sorted(modules):
            if module not in known:
                raise UserError(
                    f"{self.path / WEIGHTS} adapts {module or min(self._file.entries)!r}, which is not a module in "
                    f"this {architecture.family}: give an adapter of this model"
                )
            if not kind_of(known[module].rule):
                raise UserError(
                    f"{self.path / WEIGHTS} adapts {module}, and adapters are built for attention, MLP and experts: merge it "
                    "with PEFT's merge_and_unload and convert the result"
                )
        if not modules:
            raise UserError(f"{self.path / WEIGHTS} holds no tensors: take a whole copy of the adapter")
        words = sorted({module.rpartition(".")[2] for module in modules if known[module].expert is None})
        experts = any(known[module].expert is not None for module in modules)
        targets, with_experts = chosen_targets(architecture, ",".join([*words, *["experts"] * experts]))
        rslora, dropout = bool(self.config.get("use_rslora")), float(self.config.get("lora_dropout", 0.0))
        lora = LoRA(self.config["r"], float(self.config["lora_alpha"]), targets, with_experts, dropout, rslora)
        self._check_tensors(modules, lora, architecture)
        return lora

    def _check_tensors(self, modules: set[str], lora: LoRA, architecture: Architecture) -> None:
        """Names, shapes and dtypes against the model's."""
        file = self.path / WEIGHTS
        expected = {weight.module(place): sizes for weight, place, sizes in factor_shapes(architecture, lora)}
        if missing := sorted(expected.keys() - modules):
            raise UserError(
                f"{file} adapts {len(modules)} modules but not {missing[0]}: only the same modules in every layer can be "
                "continued"
            )
        shapes: dict[str, tuple[int, int]] = {}
        for module, (outputs, inputs) in expected.items():
            names = peft_names(module)
            shapes |= {names[0]: (lora.rank, inputs), names[1]: (outputs, lora.rank)}
        if odd := sorted(shapes.keys() ^ self._on_disk.keys()):
            raise UserError(f"{file}: {odd[0]} is missing or unknown: take a whole copy of the adapter")
        for name, (dtype, shape) in ((name, self._file.entries[there]) for name, there in self._on_disk.items()):
            if shape != shapes[name]:
                raise UserError(
                    f"{file}: {name} has the shape {list(shape)}, r {lora.rank} and this {architecture.family} need "
                    f"{list(shapes[name])}: give an adapter of this model"
                )
            if not dtype.is_floating_point:
                raise UserError(f"{file}: {name} is of {dtype}, not floating point: take another copy of the adapter")

    def tensor(self, name: str) -> Tensor:
        """A factor in float32."""
        tensor = self._file.tensor(self._on_disk[name]).float()
        if not tensor.isfinite().all():
            raise UserError(f"{self.path / WEIGHTS}: {name} holds NaN or infinity: take another copy of the adapter")
        return tensor


def _without_other_parts(name: str) -> str:
    module = name.removeprefix(PEFT_PREFIX)
    for prefix in _TEXT_PREFIXES:
        if module.startswith(prefix):
            return f"{PEFT_PREFIX}model.{module.removeprefix(prefix)}"
    return name


def _mlp_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """Dense MLPs and shared experts by the ends of their weights' names: `shared_experts.up_proj.weight`.

    With transformers 5, PEFT takes names such as `up_proj` among a mixture's modules for its experts, wherever they stand.
    """
    modules = {name.rpartition(".lora_")[0] for name in tensors if ".mlp." in name}
    return sorted({".".join([*module.split(".")[-2:], "weight"]) for module in modules})


def write_adapter_folder(
    folder: Path, lora: LoRA, base: str, tensors: Mapping[str, Tensor], text_prefix: str = "model.", mixture: bool = False
) -> None:
    """Write an adapter as PEFT does. base: name or folder of the model under it; tensors: by PEFT's names, in float32.

    text_prefix: of hf.auto_model. Where the model has other parts, modules of the same names in them get no adapter.
    mixture: of a model with experts.
    """
    parameters = _mlp_weights(tensors) if mixture and not lora.experts else []
    modules = sorted(set(lora.targets) - {name.split(".")[-2] for name in parameters})
    ours = f"{PEFT_PREFIX}model."
    names = {name: PEFT_PREFIX + text_prefix + name.removeprefix(ours) if name.startswith(ours) else name for name in tensors}

    def each() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield names[name], tensor

    write_file(
        folder / WEIGHTS, {names[name]: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}, each()
    )
    only_text = re.escape(text_prefix) + rf".*\.({'|'.join(modules)})"
    rank_or_scale = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": rank_or_scale,
        "lora_dropout": 0.0 if parameters else lora.dropout,  # PEFT has none on the latter
        "use_rslora": lora.rslora,
        "target_modules": modules if text_prefix == "model." else only_text,
        **({"target_parameters": parameters} if parameters else {}),
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    write_json(folder / CONFIG, config)
