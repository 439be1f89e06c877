"""What a run trains: every weight, every weight but those that FREEZE names, or adapters alone."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA
from megatron.sft.families.weight_names import WeightEntry, weight_entries
from megatron.sft.runtime.errors import UserError

EMBEDDING = "embedding.word_embeddings.weight"
_LAYERS = re.compile(r"layers[ :=]*(\d+)(?:-(\d+))?")
# Words of FREEZE, and what they say of a weight's name in Megatron's form.
_WORDS = {
    "embedding": r"^embedding\.",
    "head": r"^output_layer\.",
    "norms": r"norm(\.|_)weight$",
    "attention": r"\.self_attention\.(linear_(qkv|proj|down|q_up|kv_up)|in_proj|out_proj)\.(weight|bias)$",
    "mlp": r"\.mlp\.linear_fc[12]\.(weight|bias)$",
    "experts": r"\.mlp\.experts\.",
    "shared_experts": r"\.mlp\.shared_experts\.",
    "router": r"\.mlp\.router\.",
}


@dataclass(frozen=True)
class Trained:
    """lora: the adapters that alone are trained. frozen: Megatron's names of the weights that are not, without adapters."""

    lora: LoRA | None = None
    frozen: frozenset[str] = frozenset()

    @property
    def everything(self) -> bool:
        """Every weight of the model is trained."""
        return self.lora is None and not self.frozen

    def trains(self, megatron_name: str) -> bool:
        """Whether a weight of the model itself is trained."""
        return self.lora is None and megatron_name not in self.frozen


def frozen_weights(architecture: Architecture, text: str, train_router: bool) -> frozenset[str]:
    """Megatron's names of the weights that FREEZE (`text`) and TRAIN_ROUTER=0 freeze.

    Parts of FREEZE are separated by commas: a word, `layers 0-11`, or a pattern of Hugging Face's names with * and ?. A part
    that matches nothing, a pattern that matches a part of a fused weight or some experts of a layer only, and a choice that
    leaves nothing are a `UserError`.
    """
    entries = [entry for entry in weight_entries(architecture) if not entry.is_buffer]
    frozen: set[str] = set()
    if text and not text.strip(" ,"):
        raise UserError(f"FREEZE={text!r} names nothing: leave it out, or take some of {', '.join(_WORDS)}")
    for part in filter(None, (part.strip() for part in text.split(","))):
        layers = _LAYERS.fullmatch(part)
        if layers and int(layers[2] or layers[1]) >= architecture.num_layers:
            raise UserError(f"FREEZE={text!r}: {part!r}, and the model has layers 0 to {architecture.num_layers - 1}")
        found = set(_matching(entries, part))
        if not found:
            tied = " (its head is the embedding)" if part == "head" and architecture.tied_embeddings else ""
            raise UserError(
                f"FREEZE={text!r}: {part!r} names no weight of {architecture.family}{tied}: take some of "
                f"{', '.join(_WORDS)}, layers 0-{architecture.num_layers - 1}, or a pattern such as model.layers.*.mlp.*"
            )
        frozen |= found
    if not train_router:
        frozen |= set(_matching(entries, "router"))
    known = {entry.megatron for entry in entries}
    for name in sorted(frozen):
        bias = name.removesuffix(".weight") + ".bias"
        if bias in known and bias not in frozen:
            raise UserError(f"FREEZE={text!r} freezes {name} and trains its bias, which is not built: freeze both, or neither")
    _check_experts(entries, frozen, text)
    if len(frozen) == len(entries):
        raise UserError(f"FREEZE={text!r} freezes every weight: leave some to train, or train adapters with LORA_RANK")
    return frozenset(frozen)


def _check_experts(entries: Iterable[WeightEntry], frozen: set[str], text: str) -> None:
    """The experts of a layer are one product, which has gradients of all their weights or of none."""
    states: dict[tuple[str, int | None], bool] = {}
    for entry in entries:
        if entry.expert is not None:
            state = entry.megatron in frozen
            if states.setdefault((entry.rule.megatron, entry.layer), state) != state:
                raise UserError(f"FREEZE={text!r} freezes some experts of layer {entry.layer}: freeze all of them, or none")


def _matching(entries: Iterable[WeightEntry], part: str) -> Iterable[str]:
    layers = _LAYERS.fullmatch(part)
    for entry in entries:
        if layers:
            first, last = int(layers[1]), int(layers[2] or layers[1])
            matches = entry.layer is not None and first <= entry.layer <= last
        elif part in _WORDS:
            matches = re.search(_WORDS[part], entry.megatron) is not None
        else:
            hits = [fnmatch.fnmatchcase(name, part) or fnmatch.fnmatchcase(name, f"{part}.*") for name in entry.hf]
            matches = all(hits)
            if any(hits) and not matches:
                inside = [name for name, hit in zip(entry.hf, hits, strict=True) if not hit]
                raise UserError(
                    f"FREEZE: {part!r} names a part of {entry.megatron}, which is one weight with {', '.join(inside)}: "
                    "freeze all of them"
                )
        if matches:
            yield entry.megatron
