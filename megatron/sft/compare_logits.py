"""Compare a Megatron checkpoint's logits with transformers' for the Hugging Face folder that it comes from.

torchrun --nproc-per-node 2 -m megatron.sft.compare_logits --load CKPT --hf-dir HF_DIR --tensor-model-parallel-size 2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.checkpoint.adapter_record import refuse_adapters
from megatron.sft.conversion.logits import (
    TOLERANCE,
    difference_of,
    layer_table,
    megatron_logits,
    random_conversations,
    transformers_logits,
    within,
)
from megatron.sft.conversion.source_record import rope_extension
from megatron.sft.hf.folder import HFFolder
from megatron.sft.model import process_groups
from megatron.sft.model.layout import Layout
from megatron.sft.runtime.errors import OneLineParser, run


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    layout = Layout(
        arguments.tensor_model_parallel_size,
        arguments.pipeline_model_parallel_size,
        sequence_parallel=arguments.sequence_parallel,
    )
    checkpoint = checkpoint_folder.open_checkpoint(arguments.load, arguments.iteration)
    refuse_adapters(checkpoint)
    source = HFFolder(arguments.hf_dir, rope_extension(checkpoint.manifest))
    conversations = random_conversations(source)
    with process_groups.parallel(layout):
        ours = megatron_logits(checkpoint, source, layout, conversations)
        if ours is None:
            return 0
        theirs = transformers_logits(source, conversations)
        difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        print(f"largest difference of logits: {difference:.3g} (largest logit {largest:.3g})")
        if not within(difference, largest, arguments.tolerance) and layout.model_size == 1:
            print(layer_table(checkpoint, source, conversations))
        difference_of(ours, theirs, arguments.tolerance)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="compare_logits", description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--hf-dir", type=Path, required=True)
    parser.add_argument("--iteration", type=int)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, under_torchrun=True)
