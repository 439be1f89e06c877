"""Megatron to Hugging Face. `bash scripts/5_export.sh CKPT HF_DIR OUT [ITERATION]`, which runs

python -m megatron.sft.export --load CKPT --hf-dir HF_DIR --output OUT [--merge]

Adapters become PEFT's folder, or with --merge a whole model.
"""

import argparse
import itertools
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.checkpoint.adapter_record import read_lora_record, trained_base
from megatron.sft.checkpoint.adapter_shards import StoredAdapters
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.checkpoint.reading import stored_parameters
from megatron.sft.conversion.adapter_export import export_adapter
from megatron.sft.conversion.carried import CarriedTensors
from megatron.sft.conversion.exported_files import write_companions
from megatron.sft.conversion.merged_logits import compare_merged, wants_comparison
from megatron.sft.conversion.merging import Merger, base_for_merging
from megatron.sft.conversion.source_record import read_dtype_record, rope_extension, source_model
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.fused_experts import fused, fused_experts
from megatron.sft.families.long_context import extended_config
from megatron.sft.families.lora import LoRA
from megatron.sft.families.parameters import DTYPE_OPTIONS, Caster, Parameters, progress_bar
from megatron.sft.families.registry import DTYPES, read_architecture
from megatron.sft.families.weight_names import weight_entries
from megatron.sft.hf import hub
from megatron.sft.hf.block_scales import unquantised_config
from megatron.sft.hf.folder import HFFolder, write_weights
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.hf.safetensors_file import tensor_bytes
from megatron.sft.hf.tokenizer_files import num_tokens
from megatron.sft.inference.serving import serve_hint
from megatron.sft.runtime.console import say_next
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import check_free_space, read_json
from megatron.sft.runtime.whole_folder import whole_folder


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    os.environ["MEGATRON_SFT_DEVICE"] = "cpu"
    output: Path = arguments.output
    if arguments.push_to:
        hub.check_push(arguments.push_to)
    hints = _export(arguments, output)
    if arguments.push_to:
        _push(output, arguments.push_to)
    say_next(*hints)
    return 0


def _push(output: Path, id: str) -> None:
    try:
        print(f"pushed {output} to {hub.push_folder(output, id)}")
    except UserError as error:
        again = f"{shlex.join(['hf', 'upload', id, str(output)])}"
        raise UserError(f"{output} is exported, but not pushed: {error}; later: {again}") from None


def _export(arguments: argparse.Namespace, output: Path) -> list[str]:
    """Write the folder; returns the lines that say what comes next."""
    checkpoint = checkpoint_folder.open_checkpoint(arguments.load, _iteration(arguments.load, arguments.iteration))
    architecture, original = source_model(checkpoint, arguments.hf_dir)
    if original is None:
        _check_same_model(checkpoint, architecture, arguments.hf_dir)
    lora = read_lora_record(checkpoint)
    _check_options(lora, arguments)
    if lora and not arguments.merge:
        with whole_folder(output, arguments.replace) as staged, verified_meanwhile(checkpoint):
            export_adapter(checkpoint, architecture, lora, arguments.hf_dir, arguments.load, staged)
        print(f"exported the adapters in {checkpoint.path} to {output} (a whole model: MERGE=1)")
        return _next_steps(output)
    weights, merger = checkpoint, None
    if lora:
        weights = base_for_merging(checkpoint, arguments.base)
        merger = Merger(StoredAdapters(checkpoint), lora, architecture)
    with whole_folder(output, arguments.replace) as staged:
        dtypes = _dtypes(checkpoint, architecture, original, arguments.dtype)
        with verified_meanwhile(checkpoint), verified_meanwhile(weights) if merger else nullcontext():
            carried = CarriedTensors(weights, arguments.hf_dir)
            export_weights(weights, architecture, original, dtypes, staged, carried, merger)
        write_companions(checkpoint, architecture, arguments.hf_dir, arguments.dtype, arguments.load, staged)
        if lora and trained_base(checkpoint):
            print(f"not compared with the adapter: it belongs to a trained checkpoint, not to {arguments.hf_dir}")
        elif lora and wants_comparison(arguments.verify, staged):
            print(compare_merged(checkpoint, architecture, lora, arguments.hf_dir, staged))
    print(f"exported {checkpoint.path} to {output}")
    return _next_steps(output)


def _next_steps(output: Path) -> list[str]:
    command = shlex.join(["bash", "scripts/6_generate.sh", str(output), "a question"])
    return [f"next: {command}", f"or serve it with vLLM: {serve_hint(output)}"]


def _iteration(run_folder: Path, asked: str | None) -> int | None:
    """The iteration to export, None for the newest."""
    if asked is None or asked.isdecimal():
        return int(asked) if asked else None
    if asked != "best":
        raise UserError(f"ITERATION is {asked!r}: give a number, or best for the checkpoint with the lowest validation loss")
    best = checkpoint_folder.best_iteration(run_folder)
    if best is None:
        raise UserError(
            f"{run_folder} names no best checkpoint ({checkpoint_folder.BEST}): a run with validation rows (SPLIT) has one, "
            "of the steps that are validated and saved: give a number, or leave ITERATION out for the newest"
        )
    return best


def _check_options(lora: LoRA | None, arguments: argparse.Namespace) -> None:
    """A `UserError` for an option that means nothing for this checkpoint."""
    if lora is None and (arguments.merge or arguments.base):
        raise UserError(f"{arguments.load} holds a whole model, no adapters: unset MERGE and BASE")
    if lora and not arguments.merge and arguments.dtype:
        raise UserError(f"DTYPE={arguments.dtype}: adapters are written in float32: unset it, or set MERGE=1")
    if lora and not arguments.merge and arguments.base:
        raise UserError("BASE is the model that adapters are merged into: set MERGE=1, or unset it")


@contextmanager
def verified_meanwhile(checkpoint: Checkpoint) -> Iterator[None]:
    """Compare the checkpoint's files with its manifest in another thread. Reports a damaged file before any other error."""
    with ThreadPoolExecutor(1) as pool:
        verification = pool.submit(checkpoint_folder.verify_files, checkpoint)
        try:
            yield
        finally:
            verification.result()


def export_weights(
    checkpoint: Checkpoint,
    architecture: Architecture,
    original: HFFolder | None,
    dtypes: dict[str, torch.dtype],
    folder: Path,
    carried: CarriedTensors,
    merger: Merger | None = None,
) -> None:
    """Write the model's Hugging Face tensors, with one parameter in memory at a time. `dtypes`: name -> dtype to write."""
    stored = stored_parameters(checkpoint, architecture, HFParameters(original, None) if original else None)
    plan: dict[str, Tensor] = {}
    for entry in weight_entries(architecture):
        for name, tensor in zip(entry.hf, entry.rule.to_hf(architecture, stored.meta(entry)), strict=True):
            plan[name] = tensor.to(dtypes[name])
    block = original.fused_block if original else checkpoint.manifest.get("source", {}).get("fused_experts")
    form = fused_experts(architecture, str(block)) if block else None
    prefixes = original.prefixes if original else checkpoint.manifest.get("source", {}).get("prefixes", {})
    plan = dict(_on_disk(fused(form, plan.items()) if form else plan.items(), prefixes)) | carried.plan()
    check_free_space(folder, int(1.01 * sum(tensor.nbytes for tensor in plan.values())), f"the export of {checkpoint.path}")
    caster = Caster()
    tensors = _tensors(checkpoint, architecture, stored, dtypes, caster, merger)
    text = _on_disk(fused(form, tensors) if form else tensors, prefixes)
    write_weights(folder, plan, itertools.chain(text, carried.tensors()))
    reports = [merger.report() if merger else "", caster.report()]
    for line in (*getattr(stored, "notes", ()), *filter(None, reports)):
        print(line)


def _on_disk(tensors: Iterable[tuple[str, Tensor]], prefixes: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names in the family's table, by those that the original's files have. `prefixes`: see `HFFolder`."""
    for name, tensor in tensors:
        there = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        yield (name if there is None else prefixes[there] + name.removeprefix(there)), tensor


def _tensors(
    checkpoint: Checkpoint,
    architecture: Architecture,
    stored: Parameters,
    dtypes: dict[str, torch.dtype],
    caster: Caster,
    merger: Merger | None,
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, layer by layer. Tensors of an untrained model must have the checksums that the conversion noted."""
    checksums = checkpoint.manifest.get("tensor_crc32", {})
    entries = list(weight_entries(architecture))
    bar = progress_bar(sum(stored.meta(entry).nbytes for entry in entries), "export")
    for entry in entries:
        parameter = stored.read(entry)
        for name, tensor in zip(entry.hf, entry.rule.to_hf(architecture, parameter), strict=True):
            tensor = tensor.contiguous()
            if name in checksums and zlib.crc32(tensor_bytes(tensor)) != checksums[name]:
                raise UserError(
                    f"{checkpoint.path}: {name} is not what was converted (its checksum differs): convert the model again"
                )
            tensor = merger.merged(name, tensor, dtypes[name]) if merger else tensor
            yield name, caster.cast(tensor, dtypes[name])
        bar.update(parameter.nbytes)


def _dtypes(
    checkpoint: Checkpoint, architecture: Architecture, original: HFFolder | None, option: str | None
) -> dict[str, torch.dtype]:
    """Name -> dtype of the Hugging Face tensors to write: `option` (bf16, …), else the original's, as buffers have."""
    record = read_dtype_record(checkpoint, original)
    dtypes = {}
    for entry in weight_entries(architecture):
        for name in entry.hf:
            kept = DTYPES[record["hf_dtype_exceptions"].get(name, record["hf_dtype"])]
            dtypes[name] = kept if option is None or entry.is_buffer else DTYPE_OPTIONS[option]
    return dtypes


def _check_same_model(checkpoint: Checkpoint, architecture: Architecture, hf_dir: Path) -> None:
    """A `UserError` unless the checkpoint was converted from a model of the architecture that is in `hf_dir`."""
    config = read_json(hf_dir / "config.json", "model configuration", "give the Hugging Face folder that was converted")
    config = unquantised_config(config, str(hf_dir / "config.json"))
    config = extended_config(config, rope_extension(checkpoint.manifest), str(hf_dir / "config.json"))
    original = read_architecture(config, str(hf_dir / "config.json"))
    for field, value in architecture.__dict__.items():
        if field == "vocab_size" and value == max(original.vocab_size, num_tokens(hf_dir)):
            continue  # rows were added for the tokenizer's tokens
        if field != "torch_dtype" and original.__dict__[field] != value:
            raise UserError(
                f"{hf_dir / 'config.json'} has {field} {original.__dict__[field]}, {checkpoint.path} has {value}: "
                "give the folder that the checkpoint was converted from"
            )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="export", description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--hf-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iteration", help="a number, or best: the checkpoint with the lowest validation loss")
    parser.add_argument("--replace", action="store_true", help="replace an output folder that exists")
    parser.add_argument("--push-to", default="", help="OWNER/NAME on the hub to upload the folder to")
    parser.add_argument("--dtype", choices=list(DTYPE_OPTIONS), help="the original model's unless given")
    parser.add_argument("--merge", action="store_true", help="write a whole model with the adapters added to its weights")
    parser.add_argument("--base", type=Path, help="the checkpoint of the weights under the adapters, where it has moved")
    parser.add_argument("--verify", choices=["auto", "0", "1"], default="auto", help="compare a merged model with its adapters")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
