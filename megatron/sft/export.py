"""Megatron to Hugging Face. `bash scripts/5_export.sh CKPT HF_DIR OUT [ITERATION]`, which runs

python -m megatron.sft.export --load CKPT --hf-dir HF_DIR --output OUT
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron.sft import processes
from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.errors import UserError, run
from megatron.sft.families import read_shape
from megatron.sft.families.rules import Shape
from megatron.sft.hf_folder import copy_companions, write_weights
from megatron.sft.layout import Layout
from megatron.sft.manifest import read_json
from megatron.sft.weights import bound_rules


def main() -> None:
    arguments = _parse()
    os.environ["MEGATRON_SFT_DEVICE"] = "cpu"
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output folder {output} exists and is not empty: give another one, or move it away")
    checkpoint = checkpoint_folder.open_checkpoint(arguments.load, arguments.iteration)
    shape = _shape(checkpoint, arguments.hf_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _export(checkpoint, shape, arguments.hf_dir, beside)
        if output.exists():
            output.rmdir()
        beside.chmod(0o755)
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside)
        raise
    print(f"exported {checkpoint.path} to {output}\nnext: scripts/6_generate.sh {output} 'a question'")


def _export(checkpoint: Checkpoint, shape: Shape, hf_dir: Path, folder: Path) -> None:
    """Write weights, configuration, tokenizer and the template that was trained with."""
    if checkpoint.format == checkpoint_folder.TORCH:
        _export_torch_format(checkpoint, shape, hf_dir, folder)
        return
    checkpoint_folder.verify_files(checkpoint)
    with processes.parallel(Layout()):
        write_weights(folder, hf_tensors(checkpoint, shape))
    copy_companions(hf_dir, folder)


def _export_torch_format(checkpoint: Checkpoint, shape: Shape, hf_dir: Path, folder: Path) -> None:
    """Have TP x PP processes, as many as wrote the checkpoint, write it as torch_dist first."""
    from megatron.sft.checkpoint.torch_format import find_layout

    layout = find_layout(checkpoint.path)
    with tempfile.TemporaryDirectory(prefix=".torch_dist.", dir=folder.parent) as between:
        processes.run_module(
            layout.tensor_parallel * layout.pipeline_parallel,
            "reshard",
            [
                *("--load", str(checkpoint.path), "--output", between, "--ckpt-format", checkpoint_folder.TORCH_DIST),
                *("--tensor-model-parallel-size", str(layout.tensor_parallel)),
                *("--pipeline-model-parallel-size", str(layout.pipeline_parallel)),
            ],
        )
        _export(checkpoint_folder.open_checkpoint(Path(between)), shape, hf_dir, folder)


def hf_tensors(checkpoint: Checkpoint, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """The model's Hugging Face tensors in their source's dtypes, layer by layer."""
    from megatron.sft.checkpoint.weights_io import load_weights
    from megatron.sft.families import DTYPES
    from megatron.sft.model import build_model, transformer_config
    from megatron.sft.weights import whole_parameters

    whole = Layout()
    common = checkpoint.manifest["hf_dtype"]
    exceptions = checkpoint.manifest["hf_dtype_exceptions"]
    # A training checkpoint holds its weights in the training precision; float32 loses nothing of any of them.
    precision = torch.float32 if exceptions or "training" in checkpoint.manifest else DTYPES[common]
    model = build_model(shape, whole, transformer_config(shape, whole, precision))
    load_weights(checkpoint, model, whole)
    parameters = whole_parameters(model, shape)
    for bound in bound_rules(shape):
        tensors = bound.rule.to_hf(shape, parameters[bound.megatron].detach())
        for name, tensor in zip(bound.hf, tensors, strict=True):
            yield name, tensor.to(DTYPES[exceptions.get(name, common)])


def _shape(checkpoint: Checkpoint, hf_dir: Path) -> Shape:
    """The architecture, which the checkpoint and the Hugging Face folder must agree on."""
    if not hf_dir.is_dir():
        raise UserError(f"model folder {hf_dir} does not exist: give the folder that was converted")
    config = read_json(hf_dir / "config.json", "model configuration", "give the Hugging Face folder that was converted")
    theirs = read_shape(config, str(hf_dir / "config.json"))
    own = checkpoint.manifest.get("source", {}).get("config")
    if own is None:
        raise UserError(f"{checkpoint.path} has no manifest.json with the model's configuration: convert it again")
    ours = read_shape(own, str(checkpoint.path / checkpoint_folder.MANIFEST))
    for field, value in ours.__dict__.items():
        if field != "torch_dtype" and theirs.__dict__[field] != value:
            raise UserError(
                f"{hf_dir / 'config.json'} has {field} {theirs.__dict__[field]}, the checkpoint {value}: "
                "give the folder that the checkpoint was converted from"
            )
    return ours


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export", description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--hf-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iteration", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
