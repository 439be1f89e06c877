"""The `torch` format: one `mp_rank_TT[_PPP]/model_optim_rng.pt` a process, the tree of classic Megatron-LM.

A single process reads and writes it for any number of ranks, one parameter in memory at a time. Checkpoints of Megatron-LM and
of projects that contain it are read too: other names of the norms, padded vocabularies, optimizer state in the same file.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.sft.checkpoint import torch_file
from megatron.sft.checkpoint.torch_arguments import megatron_arguments
from megatron.sft.families.architecture import ATTENTION, GATED_DELTA_NET, LATENT_ATTENTION, Architecture
from megatron.sft.families.parameters import Parameters
from megatron.sft.families.rules import join_tensor_parallel, tensor_parallel_part
from megatron.sft.families.weight_names import WeightEntry, checkpoint_name, weight_entries
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.model.layout import Layout
from megatron.sft.runtime.errors import UserError

FILE = "model_optim_rng.pt"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

# Classic Megatron-LM builds these layers with Transformer Engine and expects their extra state, None without FP8.
_ENGINE_LAYERS = {
    ATTENTION: ("linear_qkv", "linear_proj", "core_attention"),
    GATED_DELTA_NET: ("in_proj", "out_proj"),
    LATENT_ATTENTION: ("linear_q_up", "linear_kv_up", "linear_proj", "core_attention"),
}
_ENGINE_MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
_ENGINE_SHARED = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_EXPERT = re.compile(r"\.experts\.experts\.(\d+)\.")

Rank = tuple[int, int, int]  # tensor-, pipeline- and expert-parallel rank


def rank_folder(rank: Rank, layout: Layout) -> str:
    """`mp_rank_01`, `mp_rank_01_002` where the pipeline has stages, and one more number where experts are spread."""
    name = f"mp_rank_{rank[0]:02d}"
    if layout.pipeline_parallel > 1:
        name += f"_{rank[1]:03d}"
    return name + (f"_{rank[2]:03d}" if layout.expert_parallel > 1 else "")


def save_parameters(folder: Path, architecture: Architecture, layout: Layout, source: Parameters, iteration: int) -> None:
    """Write every rank's part of the model, with the arguments that Megatron-LM checks and `--use-checkpoint-args` reads."""
    content = {
        "args": megatron_arguments(architecture, layout, iteration),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }
    stages, expert_ranks = range(layout.pipeline_parallel), range(layout.expert_parallel)
    for rank in itertools.product(range(layout.tensor_parallel), stages, expert_ranks):
        entries = dict(_local_entries(architecture, layout, rank))
        state: dict[str, Any] = {
            name: _part(entry, source.meta(entry), architecture, layout, rank[0]) for name, entry in entries.items()
        }
        state.update(_engine_states(architecture, layout, rank[1]))
        parts = ((name, _part(entry, source.read(entry), architecture, layout, rank[0])) for name, entry in entries.items())
        path = folder / rank_folder(rank, layout) / FILE
        path.parent.mkdir()
        torch_file.write(path, content, state, parts)


def _local_entries(architecture: Architecture, layout: Layout, rank: Rank) -> Iterator[tuple[str, WeightEntry]]:
    """The parameters of one rank under their names there: layers and experts are counted from the rank's first."""
    stage_layers = layout.stage_layers(architecture)
    first = sum(stage_layers[: rank[1]])
    layers = range(first, first + stage_layers[rank[1]])
    last_stage = rank[1] == layout.pipeline_parallel - 1
    num_experts = architecture.moe.num_experts // layout.expert_parallel if architecture.moe else 0
    for entry in weight_entries(architecture):
        name = entry.megatron
        if entry.layer is None:
            if (name == EMBEDDING and rank[1] == 0) or (name != EMBEDDING and last_stage):
                yield name, entry
            if name == EMBEDDING and architecture.tied_embeddings and last_stage and rank[1] > 0:
                yield OUTPUT, entry  # the last stage's copy of the tied embedding
            continue
        if entry.layer not in layers:
            continue
        name = name.replace(f"layers.{entry.layer}.", f"layers.{entry.layer - first}.", 1)
        if entry.expert is not None:
            if entry.expert // num_experts != rank[2]:
                continue
            name = _EXPERT.sub(f".experts.local_experts.{entry.expert % num_experts}.", name)
        yield name, entry


def _part(entry: WeightEntry, parameter: Tensor, architecture: Architecture, layout: Layout, tensor_rank: int) -> Tensor:
    if entry.megatron in (EMBEDDING, OUTPUT):
        parameter = padded(parameter, layout.padded_vocab_size(architecture))
    return tensor_parallel_part(entry.rule, parameter, tensor_rank, layout.tensor_parallel)


def padded(rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows, ...]: the rows, then rows of zeros."""
    if len(rows) == num_rows:
        return rows
    return torch.cat([rows, rows.new_zeros(num_rows - len(rows), *rows.shape[1:])])


def _engine_states(architecture: Architecture, layout: Layout, stage: int) -> dict[str, None]:
    counts = layout.stage_layers(architecture)
    state: dict[str, None] = {}
    for number in range(counts[stage]):
        layer = architecture.layers[sum(counts[:stage]) + number]
        mixer = [f"self_attention.{name}" for name in _ENGINE_LAYERS[layer.mixer]]
        has_shared = architecture.moe is not None and architecture.moe.shared_width > 0
        block = _ENGINE_MLP if not layer.experts else _ENGINE_SHARED if has_shared else ()
        state.update({f"decoder.layers.{number}.{module}._extra_state": None for module in (*mixer, *block)})
    if stage == layout.pipeline_parallel - 1:
        state.update({"decoder.final_layernorm._extra_state": None, "output_layer._extra_state": None})
    return state


class TorchFormatParameters:
    """Whole Megatron parameters of a `torch` checkpoint of any TP, PP and EP.

    A vocabulary padded beyond the model's is cut. Where the checkpoint has fewer rows than the model, the rest is taken from
    `source`, the original model, and `notes` gets a line about it.
    """

    def __init__(self, folder: Path, architecture: Architecture, source: HFParameters | None) -> None:
        self.folder = folder
        self.architecture = architecture
        self.notes: list[str] = []
        self._source = source
        # Name in the table -> the tensor on each tensor-parallel rank.
        self._parts: dict[str, dict[int, Tensor]] = {}
        ranks = _read_ranks(folder, architecture)
        tensor_parallel, pipeline_parallel, expert_parallel = (1 + max(rank[i] for rank in ranks) for i in range(3))
        self.layout = Layout(tensor_parallel, pipeline_parallel, expert_parallel=expert_parallel)
        if len(ranks) != self.layout.tensor_parallel * self.layout.pipeline_parallel * self.layout.expert_parallel:
            raise UserError(
                f"{folder} has {len(ranks)} rank folders, TP {self.layout.tensor_parallel} x PP "
                f"{self.layout.pipeline_parallel} x EP {self.layout.expert_parallel} need more: take another checkpoint"
            )
        self._collect(ranks)
        self._check_names()
        _check_arguments(folder, architecture, next(iter(ranks.values())).get("args"), self.notes)

    def _collect(self, ranks: dict[Rank, dict[str, Any]]) -> None:
        counts = {rank[1]: _num_layers(content["model"]) for rank, content in ranks.items()}
        if sum(counts.values()) != self.architecture.num_layers:
            raise UserError(f"{self.folder} has {sum(counts.values())} layers, the model has {self.architecture.num_layers}")
        moe = self.architecture.moe
        for (tensor_rank, stage, expert_rank), content in ranks.items():
            first_layer = sum(count for other, count in counts.items() if other < stage)
            first_expert = expert_rank * (moe.num_experts // self.layout.expert_parallel) if moe else 0
            for name, value in content["model"].items():
                if isinstance(value, Tensor) and not name.endswith(("_extra_state", "inv_freq")):
                    name = checkpoint_name(name, self.architecture, first_layer, first_expert)
                    # The first expert-parallel rank's copy of what all of them hold.
                    self._parts.setdefault(name, {}).setdefault(tensor_rank, value)

    def _check_names(self) -> None:
        expected = {entry.megatron for entry in weight_entries(self.architecture)}
        if self.architecture.tied_embeddings and OUTPUT in self._parts:
            self._check_tied()
        for name in sorted(self._parts.keys() ^ expected):
            where = "not in the model" if name in self._parts else "not in the checkpoint"
            raise UserError(f"{self.folder} does not fit the model: {name} is {where}")
        for name, parts in self._parts.items():
            if len(parts) != self.layout.tensor_parallel:
                raise UserError(f"{self.folder} holds {name} only in part: take another checkpoint")

    def _check_tied(self) -> None:
        copies, rows = self._parts.pop(OUTPUT), self._parts.get(EMBEDDING, {})
        if any(rank not in rows or not torch.equal(copies[rank], rows[rank]) for rank in copies):
            raise UserError(
                f"{self.folder} was trained with a separate output layer, config.json ties it to the embedding: "
                "set tie_word_embeddings to false in the model's config.json, which must then hold lm_head.weight"
            )

    def meta(self, entry: WeightEntry) -> Tensor:
        parts = [torch.empty_like(part, device="meta") for _, part in sorted(self._parts[entry.megatron].items())]
        whole = self._join(entry, parts)
        if entry.megatron in (EMBEDDING, OUTPUT):
            return torch.empty((self.architecture.vocab_size, *whole.shape[1:]), dtype=whole.dtype, device="meta")
        return whole

    def read(self, entry: WeightEntry) -> Tensor:
        whole = self._join(entry, [part for _, part in sorted(self._parts[entry.megatron].items())])
        if entry.megatron not in (EMBEDDING, OUTPUT):
            return whole
        missing = self.architecture.vocab_size - len(whole)
        if missing <= 0:
            return whole[: self.architecture.vocab_size]
        if self._source is None:
            raise UserError(
                f"{self.folder} has {len(whole)} rows of {entry.megatron}, the model has {self.architecture.vocab_size}: "
                "give the original model's folder for the rest (HF_DIR)"
            )
        original = self._source.folder.path
        note = f"the last {missing:,} rows of {entry.megatron}, which the checkpoint lacks, are those of {original}"
        if note not in self.notes:
            self.notes.append(note)
        return torch.cat([whole, self._source.read(entry)[-missing:].to(whole.dtype)])

    def _join(self, entry: WeightEntry, parts: list[Tensor]) -> Tensor:
        try:
            return join_tensor_parallel(entry.rule, parts)
        except RuntimeError as error:
            raise UserError(f"{self.folder}: the ranks' parts of {entry.megatron} do not fit together ({error})") from None


def _read_ranks(folder: Path, architecture: Architecture) -> dict[Rank, dict[str, Any]]:
    """Every rank's file. A second number in a folder's name is a pipeline stage, unless all ranks have an embedding."""
    contents: dict[tuple[int, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob(f"mp_rank_*/{FILE}")):
        numbers = path.parent.name.removeprefix("mp_rank_").split("_")
        if not all(number.isdecimal() for number in numbers) or len(numbers) > 3:
            raise UserError(f"{path.parent} does not have the name of a Megatron-LM rank: move it away")
        content = torch_file.read(path)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            is_virtual = isinstance(content, dict) and "model0" in content
            reason = " (it was written with virtual pipeline stages)" if is_virtual else ""
            raise UserError(f"{path} has no weights under 'model'{reason}: take another checkpoint")
        contents[tuple(map(int, numbers))] = content
    experts_only = architecture.moe is not None and all(EMBEDDING in content["model"] for content in contents.values())
    ranks: dict[Rank, dict[str, Any]] = {}
    for key, content in contents.items():
        if len(key) == 2 and experts_only:
            key = (key[0], 0, key[1])
        ranks[(*key, 0, 0)[:3]] = content  # type: ignore[index]
    return ranks


def _num_layers(state: dict[str, Any]) -> int:
    layers = {int(name.split(".")[2]) for name in state if name.startswith("decoder.layers.")}
    return 1 + max(layers, default=-1)


def _check_arguments(folder: Path, architecture: Architecture, arguments: Any, notes: list[str]) -> None:
    """Compare the checkpoint's arguments with the model's, where the shapes of tensors do not show a difference."""
    expected = {"rotary_base": architecture.ropes[0].theta, "norm_epsilon": architecture.norm_epsilon}
    expected |= {"num_attention_heads": architecture.num_heads, "num_query_groups": architecture.num_kv_heads}
    for name, value in expected.items():
        stored = getattr(arguments, name, None)
        if name == "num_query_groups" and not getattr(arguments, "group_query_attention", True):
            continue
        if not isinstance(stored, int | float) or stored == value:
            continue
        if name.startswith("num"):
            raise UserError(f"{folder} was written with {name} {stored}, config.json implies {value}: give the right model")
        notes.append(f"the checkpoint was trained with {name} {stored}, config.json says {value}: config.json is used")
