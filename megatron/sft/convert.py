"""Hugging Face to Megatron. `bash scripts/2_convert.sh HF_DIR TP PP [OUT]`, which runs

python -m megatron.sft.convert --hf-dir HF_DIR --output OUT --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron.sft import processes
from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.errors import UserError, run
from megatron.sft.hf_folder import HFFolder, dtype_name, shape_record
from megatron.sft.layout import Layout, check_layout
from megatron.sft.weights import bound_rules, check_hf_names

ITERATION = 1


def main() -> None:
    arguments = _parse()
    layout = Layout(arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
    source = HFFolder(arguments.hf_dir)
    check_layout(layout, source.shape)
    passed_over = check_hf_names(source.shape, source.tensor_names, str(source.path))
    output: Path = arguments.output
    if checkpoint_folder.latest_iteration(output) is not None:
        _accept_existing(output, arguments.ckpt_format, source, layout)
        return
    if passed_over:
        print(f"not converted, because config.json implies them: {', '.join(passed_over)}")
    os.environ["MEGATRON_SFT_DEVICE"] = "cpu"
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=_made(output.parent)))
    try:
        _convert(source, layout, arguments.ckpt_format, beside)
        if output.exists() and not any(output.iterdir()):
            output.rmdir()
        beside.chmod(0o755)
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside)
        raise
    print(f"converted {source.path} to {output} ({arguments.ckpt_format}, TP {layout.tensor_parallel}, ", end="")
    print(f"PP {layout.pipeline_parallel})\nnext: scripts/3_tokenize.sh {source.path} DATA_FILE LENGTH")


def _convert(source: HFFolder, layout: Layout, ckpt_format: str, output: Path) -> None:
    """Write a whole model as torch_dist; for the `torch` format hand that to TP x PP processes."""
    manifest = {
        "checkpoint_format": checkpoint_folder.TORCH_DIST,
        "shape": shape_record(source.shape),
        "layout": {"tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel},
        "source": source.describe(),
    }
    with tempfile.TemporaryDirectory(prefix=".torch_dist.", dir=output) as between:
        first_target = output if ckpt_format == checkpoint_folder.TORCH_DIST else Path(between)
        _write_torch_dist(source, manifest, first_target)
        if ckpt_format == checkpoint_folder.TORCH:
            processes.run_module(
                layout.tensor_parallel * layout.pipeline_parallel,
                "reshard",
                [
                    *("--load", between, "--output", str(output), "--ckpt-format", ckpt_format),
                    *("--tensor-model-parallel-size", str(layout.tensor_parallel)),
                    *("--pipeline-model-parallel-size", str(layout.pipeline_parallel)),
                ],
            )


def _write_torch_dist(source: HFFolder, manifest: dict[str, Any], output: Path) -> None:
    import torch

    whole = Layout()
    with processes.parallel(whole):
        from megatron.sft.checkpoint import torch_dist
        from megatron.sft.model import build_model, transformer_config
        from megatron.sft.weights import whole_parameters

        shape = source.shape
        model = build_model(shape, whole, transformer_config(shape, whole, shape.torch_dtype))
        parameters = whole_parameters(model, shape)
        dtypes: dict[str, str] = {}
        for bound in bound_rules(shape):
            tensors = [source.tensor(name) for name in bound.hf]
            converted = bound.rule.to_megatron(shape, *tensors)
            parameter = parameters[bound.megatron]
            if converted.shape != parameter.shape:
                raise UserError(
                    f"{source.path}: {bound.hf[0]} gives {tuple(converted.shape)} for {bound.megatron}, "
                    f"config.json implies {tuple(parameter.shape)}: weights and configuration do not belong together"
                )
            # Keeps the dtype on disk, which may differ from tensor to tensor.
            parameter.data = converted
            dtypes.update({n: dtype_name(t.dtype) for n, t in zip(bound.hf, tensors, strict=True)})
        common = max(set(dtypes.values()), key=list(dtypes.values()).count)
        manifest["hf_dtype"] = common
        manifest["hf_dtype_exceptions"] = {name: dtype for name, dtype in dtypes.items() if dtype != common}
        with torch.no_grad():
            state = torch_dist.model_state(model)
        checkpoint_folder.write_checkpoint(output, ITERATION, manifest, lambda folder: torch_dist.save(folder, state))


def _accept_existing(output: Path, ckpt_format: str, source: HFFolder, layout: Layout) -> None:
    """A finished conversion of the same weights to the same form is taken as done; another one is refused."""
    existing = checkpoint_folder.open_checkpoint(output)
    wanted = {"tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel}
    same_source = existing.manifest.get("source", {}).get("weights_sha256") == source.describe()["weights_sha256"]
    if existing.format == ckpt_format and existing.manifest.get("layout") == wanted and same_source:
        print(f"{output} is already the conversion of {source.path}: nothing to do")
        return
    raise UserError(f"{output} holds another checkpoint (or of another source): give another OUT, or move it away")


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert", description=__doc__)
    parser.add_argument("--hf-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    formats = [checkpoint_folder.TORCH_DIST, checkpoint_folder.TORCH]
    parser.add_argument("--ckpt-format", choices=formats, default=checkpoint_folder.TORCH_DIST)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
