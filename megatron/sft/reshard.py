"""Change a checkpoint's format: run in TP x PP processes, each of which reads or writes its own part.

torchrun --nproc-per-node 2 -m megatron.sft.reshard --load IN --output OUT --ckpt-format torch --tensor-model-parallel-size 2
"""

import argparse
from pathlib import Path

from megatron.sft import processes
from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.errors import run
from megatron.sft.families import read_shape
from megatron.sft.layout import Layout


def main() -> None:
    arguments = _parse()
    layout = Layout(arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
    source = checkpoint_folder.open_checkpoint(arguments.load, arguments.iteration)
    shape = read_shape(source.manifest["source"]["config"], str(source.path / checkpoint_folder.MANIFEST))
    with processes.parallel(layout):
        from megatron.sft.checkpoint import torch_dist, torch_format
        from megatron.sft.checkpoint.weights_io import load_weights
        from megatron.sft.model import build_model, transformer_config

        model = build_model(shape, layout, transformer_config(shape, layout, shape.torch_dtype))
        load_weights(source, model, layout)
        manifest = {
            **{key: value for key, value in source.manifest.items() if key not in ("files", "training")},
            "checkpoint_format": arguments.ckpt_format,
            "layout": {"tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel},
        }

        def write(folder: Path) -> None:
            if arguments.ckpt_format == checkpoint_folder.TORCH:
                torch_format.save(folder, model, shape, layout, source.iteration)
            else:
                torch_dist.save(folder, torch_dist.model_state(model))

        checkpoint_folder.write_checkpoint(arguments.output, source.iteration, manifest, write)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reshard", description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iteration", type=int)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--ckpt-format", choices=[checkpoint_folder.TORCH_DIST, checkpoint_folder.TORCH], required=True)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
