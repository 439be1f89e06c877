"""Megatron to Hugging Face. `bash scripts/5_export.sh CKPT HF_DIR OUT [ITERATION]`, which runs

python -m megatron.sft.export --load CKPT --hf-dir HF_DIR --output OUT
"""

import argparse
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.checkpoint.stored_tensors import stored_parameters
from megatron.sft.conversion.exported_files import write_companions
from megatron.sft.conversion.reshard import hf_dtypes
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.casting import NAMES, Caster
from megatron.sft.families.parameters import Parameters, progress_bar
from megatron.sft.families.registry import DTYPES, read_architecture
from megatron.sft.families.weight_names import check_hf_names, weight_entries
from megatron.sft.hf.folder import HFFolder, num_tokens, write_weights
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.hf.safetensors_file import tensor_bytes
from megatron.sft.inference.serving import serve_hint
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import check_free_space, read_json


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    os.environ["MEGATRON_SFT_DEVICE"] = "cpu"
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output folder {output} exists and is not empty: give another one, or move it away")
    checkpoint = checkpoint_folder.open_checkpoint(arguments.load, arguments.iteration)
    architecture, original = _model(checkpoint, arguments.hf_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        dtypes = _dtypes(checkpoint, architecture, original, arguments.dtype)
        with verified_meanwhile(checkpoint):
            export_weights(checkpoint, architecture, original, dtypes, beside)
        write_companions(checkpoint, architecture, arguments.hf_dir, arguments.dtype, arguments.load, beside)
        if output.exists():
            output.rmdir()
        beside.chmod(0o755)
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside)
        raise
    print(f"exported {checkpoint.path} to {output}\nnext: scripts/6_generate.sh {output} 'a question'")
    print(f"or serve it with vLLM: {serve_hint(output)}")
    return 0


@contextmanager
def verified_meanwhile(checkpoint: Checkpoint) -> Iterator[None]:
    """Compare the checkpoint's files with its manifest beside the work. A damaged file is what the user hears of first."""
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
) -> None:
    """Write the model's Hugging Face tensors, in `dtypes` by name, with one parameter in memory at a time."""
    stored = stored_parameters(checkpoint, architecture, HFParameters(original, None) if original else None)
    plan: dict[str, Tensor] = {}
    for entry in weight_entries(architecture):
        for name, tensor in zip(entry.hf, entry.rule.to_hf(architecture, stored.meta(entry)), strict=True):
            plan[name] = tensor.to(dtypes[name])
    check_free_space(
        folder, int(1.01 * sum(tensor.nbytes for tensor in plan.values())), f"the export of {checkpoint.path}"
    )
    caster = Caster()
    write_weights(folder, plan, _tensors(checkpoint, architecture, stored, dtypes, caster))
    for line in (*getattr(stored, "notes", ()), *filter(None, [caster.report()])):
        print(line)


def _tensors(
    checkpoint: Checkpoint,
    architecture: Architecture,
    stored: Parameters,
    dtypes: dict[str, torch.dtype],
    caster: Caster,
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, layer by layer; those of an untrained model are compared with the checksums of the conversion."""
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
            yield name, caster.cast(tensor, dtypes[name])
        bar.update(parameter.nbytes)


def _dtypes(
    checkpoint: Checkpoint, architecture: Architecture, original: HFFolder | None, asked: str | None
) -> dict[str, torch.dtype]:
    common, exceptions = hf_dtypes(checkpoint, original)
    if asked is not None:
        common, exceptions = str(NAMES[asked]).removeprefix("torch."), {}
    return {name: DTYPES[exceptions.get(name, common)] for entry in weight_entries(architecture) for name in entry.hf}


def _model(checkpoint: Checkpoint, hf_dir: Path) -> tuple[Architecture, HFFolder | None]:
    """The architecture, which the checkpoint and the Hugging Face folder must agree on.

    For a checkpoint without a manifest the folder's weights are opened too: they tell the dtypes, and rows that are missing.
    """
    if not hf_dir.is_dir():
        raise UserError(f"model folder {hf_dir} does not exist: give the folder that was converted")
    own = checkpoint.manifest.get("source", {}).get("config")
    if own is None:
        original = HFFolder(hf_dir)
        check_hf_names(original.architecture, original.tensor_names, str(hf_dir))
        return original.architecture, original
    config = read_json(hf_dir / "config.json", "model configuration", "give the Hugging Face folder that was converted")
    theirs = read_architecture(config, str(hf_dir / "config.json"))
    ours = read_architecture(own, str(checkpoint.path / checkpoint_folder.MANIFEST))
    for field, value in ours.__dict__.items():
        if field == "vocab_size" and value == max(theirs.vocab_size, num_tokens(hf_dir)):
            continue  # rows were added for the tokenizer's tokens
        if field != "torch_dtype" and theirs.__dict__[field] != value:
            raise UserError(
                f"{hf_dir / 'config.json'} has {field} {theirs.__dict__[field]}, the checkpoint {value}: "
                "give the folder that the checkpoint was converted from"
            )
    return ours, None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="export", description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--hf-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iteration", type=int)
    parser.add_argument("--dtype", choices=list(NAMES), help="the original model's unless given")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
