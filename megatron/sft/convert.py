"""To a Megatron checkpoint, from a Hugging Face folder or a checkpoint. `bash scripts/2_convert.sh SOURCE TP PP [OUT]` runs

python -m megatron.sft.convert --source SOURCE --output OUT --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron.sft.checkpoint import folder as checkpoint_folder
from megatron.sft.conversion.carried import write_carried
from megatron.sft.conversion.checkpoint_writer import layout_record, requested_layout, write_parameters
from megatron.sft.conversion.source_record import converted_config, dtype_record
from megatron.sft.families.long_context import KINDS, RopeExtension
from megatron.sft.families.parameters import DTYPE_OPTIONS
from megatron.sft.families.weight_names import check_hf_names, weight_entries
from megatron.sft.hf.download_record import check_weights
from megatron.sft.hf.folder import HFFolder, dtype_name
from megatron.sft.hf.parameters import HFParameters
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.runtime.console import say_next
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.whole_folder import whole_folder

ITERATION = 1
# Bytes of weights up to which a model is compared with transformers after conversion, unless VERIFY says otherwise.
VERIFY_BYTES = 4_000_000_000


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    # Compilers are not needed here, and loading them takes seconds.
    os.environ.update(MEGATRON_SFT_DEVICE="cpu", TORCHDYNAMO_DISABLE="1")
    source: Path | None = arguments.source or arguments.hf_dir
    if source is None:
        raise UserError("nothing to convert: give a Hugging Face model folder or a checkpoint (--source)")
    if source.is_dir() and not (source / "config.json").exists() and _is_checkpoint(source):
        from megatron.sft.conversion.reshard import reshard

        if arguments.rope_scaling:
            raise UserError(f"ROPE_SCALING={arguments.rope_scaling} extends a Hugging Face model, {source} is a checkpoint")
        with whole_folder(arguments.output) as staged:
            reshard(source, staged, arguments)
        print(f"converted {source} to {arguments.output} ({_form(arguments)})")
        return 0
    _from_hugging_face(HFFolder(source, _extension(arguments)), arguments)
    return 0


def _extension(arguments: argparse.Namespace) -> RopeExtension | None:
    if arguments.rope_scaling is None:
        if arguments.rope_factor or arguments.rope_original:
            raise UserError(f"ROPE_FACTOR and ROPE_ORIGINAL need ROPE_SCALING: one of {', '.join(KINDS)}")
        return None
    if arguments.rope_factor is None:
        raise UserError(f"ROPE_SCALING={arguments.rope_scaling} needs ROPE_FACTOR, for example ROPE_FACTOR=4")
    return RopeExtension(arguments.rope_scaling, arguments.rope_factor, arguments.rope_original)


def _is_checkpoint(path: Path) -> bool:
    return (path / checkpoint_folder.TRACKER).exists() or path.name.startswith("iter_") or any(path.glob("iter_*"))


def _form(arguments: argparse.Namespace) -> str:
    layout = requested_layout(arguments)
    experts = f", EP {layout.expert_parallel}" if layout.expert_parallel > 1 else ""
    return f"{arguments.ckpt_format}, TP {layout.tensor_parallel}, PP {layout.pipeline_parallel}{experts}"


def _from_hugging_face(source: HFFolder, arguments: argparse.Namespace) -> None:
    layout = requested_layout(arguments)
    check_layout(layout, source.architecture)
    skipped = check_hf_names(source.architecture, source.tensor_names, str(source.path))
    _check_dtypes(source, skipped, arguments.dtype)
    output: Path = arguments.output
    if checkpoint_folder.latest_iteration(output) is not None:
        _accept_existing(arguments, source, layout)
        return
    check_weights(source.path)
    for note in source.notes:
        print(note)
    _check_tied(source, skipped)
    if skipped:
        print(f"not converted, because config.json implies them: {', '.join(skipped)}")
    if source.architecture.vocab_size > source.rows_on_disk:
        new = source.architecture.vocab_size - source.rows_on_disk
        print(
            f"the tokenizer has {new:,} tokens more than the embedding has rows: rows near the mean of the old ones are added"
        )
    with whole_folder(output) as staged:
        _convert(source, layout, arguments, staged)
        if _wants_verification(arguments.verify, source):
            _verify(source, staged)
    print(f"converted {source.path} to {output} ({_form(arguments)})")
    command = f"bash scripts/3_tokenize.sh {shlex.quote(str(source.path))} DATA LENGTH"
    say_next(f"then, with your DATA and a LENGTH such as 4096: {command}")


def _check_dtypes(source: HFFolder, skipped: list[str], option: str | None) -> None:
    """A `UserError` for weights in a precision that nothing here trains or exports; DTYPE (`option`) casts those of 64 bits."""
    dtypes = {name: source.dtype_and_shape(name)[0] for name in sorted(source.tensor_names - set(skipped))}
    odd = [name for name, dtype in dtypes.items() if dtype not in DTYPE_OPTIONS.values()]
    can_be_cast = all(dtypes[name] == torch.float64 for name in odd)
    if not odd or (option and can_be_cast):
        return
    advice = "take the model in its original precision"
    if can_be_cast:
        advice = "set DTYPE=fp32 (or bf16), which casts them and counts the values that change"
    raise UserError(f"{source.path}: {len(odd)} weights are in {dtype_name(dtypes[odd[0]])}, {odd[0]} among them: {advice}")


def _check_tied(source: HFFolder, skipped: list[str]) -> None:
    """A `UserError` for a separate output layer in a model whose config.json ties it to the embedding: one of them is wrong."""
    embedding = "model.embed_tokens.weight"
    if not source.architecture.tied_embeddings or "lm_head.weight" not in skipped or embedding not in source.tensor_names:
        return
    if not torch.equal(source.tensor("lm_head.weight"), source.tensor(embedding)):
        raise UserError(
            f"{source.path / 'config.json'} ties the output layer to the embedding, the weights have another lm_head.weight: "
            "set tie_word_embeddings to false, or take the configuration that belongs to the weights"
        )


def _convert(source: HFFolder, layout: Layout, arguments: argparse.Namespace, output: Path) -> None:
    parameters = HFParameters(source, DTYPE_OPTIONS.get(arguments.dtype))

    def finish(folder: Path) -> dict[str, Any]:
        report = parameters.caster.report()
        if report:
            print(report)
        names = [name for entry in weight_entries(source.architecture) for name in entry.hf]
        config = converted_config(source.config, source.architecture, arguments.dtype)
        origin = {**source.manifest_entry(), "config": config, "weights_fingerprint": parameters.fingerprint()}
        return {
            "source": {**origin, **write_carried(source, folder)},
            **dtype_record({name: parameters.hf_meta(name).dtype for name in names}),
            "tensor_crc32": parameters.crc32,
        }

    with ThreadPoolExecutor(1) as pool:
        # Most of this is done while megatron-core is still being imported.
        checked = pool.submit(parameters.check_all)
        write_parameters(parameters, source.architecture, layout, arguments.ckpt_format, output, ITERATION, finish)
        checked.result()


def _wants_verification(verify: str, source: HFFolder) -> bool:
    if verify in ("0", "1") and not (verify == "1" and source.dequantised):
        return verify == "1"
    if source.num_bytes >= VERIFY_BYTES:
        print(f"not compared with transformers: {source.num_bytes / 1e9:.1f} GB of weights (VERIFY=1 compares them)")
        return False
    if source.dequantised:
        print("not compared with transformers, which computes with the quantized weights")
        return False
    import psutil  # type: ignore[import-untyped]

    bytes_a_value = min(source.dtype_and_shape(name)[0].itemsize for name in source.tensor_names)
    needed = int(1.5 * source.num_bytes * 4 / bytes_a_value)
    if psutil.virtual_memory().available < needed:
        print(f"not compared with transformers: that needs {needed / 1e9:.1f} GB of memory (VERIFY=1 compares them)")
        return False
    return True


def _verify(source: HFFolder, output: Path) -> None:
    from megatron.sft.conversion.logits import compare_whole

    print("comparing its logits with transformers' (VERIFY=0 skips this)", flush=True)
    difference, largest = compare_whole(checkpoint_folder.open_checkpoint(output), source)
    print(f"verified: logits as transformers' to {difference:.2g} (largest {largest:.3g})")


def _accept_existing(arguments: argparse.Namespace, source: HFFolder, layout: Layout) -> None:
    """A finished conversion of the same weights to the same form counts as done; another one is a `UserError`."""
    output: Path = arguments.output
    existing = checkpoint_folder.open_checkpoint(output)
    theirs = existing.manifest.get("source", {})
    same_source = theirs.get("weights_fingerprint") == HFParameters(source, None).fingerprint()
    same_source = same_source and theirs.get("fused_experts") == source.fused_block
    same_config = theirs.get("config") == converted_config(source.config, source.architecture, arguments.dtype)
    same_form = existing.format == arguments.ckpt_format and existing.manifest.get("layout") == layout_record(layout)
    if same_form and same_source and same_config:
        print(f"{output} is already the conversion of {source.path}: nothing to do")
        return
    raise UserError(f"{output} holds a checkpoint of another source or form: give another OUT, or move it away")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="convert", description=__doc__)
    parser.add_argument("--source", type=Path, help="a Hugging Face model folder, or a checkpoint of any format and layout")
    parser.add_argument("--hf-dir", type=Path, help="the original model of a checkpoint that has no manifest")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iteration", type=int, help="of a checkpoint; the latest unless given")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    formats = [checkpoint_folder.TORCH_DIST, checkpoint_folder.TORCH]
    parser.add_argument("--ckpt-format", choices=formats, default=checkpoint_folder.TORCH_DIST)
    parser.add_argument("--dtype", choices=list(DTYPE_OPTIONS), help="the source's unless given")
    parser.add_argument("--verify", choices=["auto", "0", "1"], default="0", help="compare logits with transformers")
    parser.add_argument("--rope-scaling", choices=KINDS, help="extend the positions of a Hugging Face model")
    parser.add_argument("--rope-factor", type=float, help="by how much")
    parser.add_argument(
        "--rope-original", type=int, help="positions it was trained on; its max_position_embeddings unless given"
    )
    parser.add_argument("--with-optimizer", action="store_true", help="keep a training checkpoint's optimizer state")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
