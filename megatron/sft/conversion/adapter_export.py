"""Adapters of a checkpoint as PEFT's folder, with the tokenizer and the chat template that they were trained with."""

from pathlib import Path

from megatron.sft.checkpoint.adapter_record import trained_base
from megatron.sft.checkpoint.adapter_shards import StoredAdapters
from megatron.sft.checkpoint.folder import Checkpoint
from megatron.sft.conversion.exported_files import write_companions
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA
from megatron.sft.hf.adapter_folder import write_adapter_folder
from megatron.sft.hf.auto_model import text_prefix
from megatron.sft.hf.folder import HFFolder
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_free_space


def export_adapter(
    checkpoint: Checkpoint, architecture: Architecture, lora: LoRA, hf_dir: Path, run_folder: Path, folder: Path
) -> None:
    """Write the float32 master weights of the adapters under PEFT's names.

    A base that has rows of the vocabulary which `hf_dir` lacks, or was trained since it was converted from `hf_dir`, is a
    `UserError`: the adapter would not fit what it names.
    """
    if base := trained_base(checkpoint):
        converted_from = checkpoint.manifest.get("source", {}).get("path")
        if converted_from is None or Path(converted_from).resolve() == hf_dir.resolve():
            raise UserError(
                f"the adapters in {checkpoint.path} were trained on {base}, a trained checkpoint, not on {hf_dir}: set "
                "MERGE=1, or export that checkpoint and give its export as HF_DIR"
            )
        print(f"the adapters belong to the weights in {base}, whose export {hf_dir} must be")
    original = HFFolder(hf_dir)
    rows = original.rows_on_disk
    if rows < architecture.vocab_size:
        raise UserError(
            f"the adapters' base has {architecture.vocab_size:,} rows of the vocabulary, {hf_dir} {rows:,}: rows were added "
            "for the tokenizer's tokens, which an adapter does not hold: export with MERGE=1"
        )
    stored = StoredAdapters(checkpoint)
    tensors = {name: stored.tensor(name) for name in stored.names}
    check_free_space(folder, sum(tensor.nbytes for tensor in tensors.values()), f"the adapter in {checkpoint.path}")
    write_companions(checkpoint, architecture, hf_dir, None, run_folder, folder)
    # The base's; with it, programs would take the folder for a whole model.
    (folder / "config.json").unlink()
    mixture = architecture.moe is not None
    write_adapter_folder(folder, lora, str(hf_dir.resolve()), tensors, text_prefix(original.config), mixture)
    if mixture and lora.experts and any(".mlp." in name and ".experts." not in name for name in tensors):
        print("PEFT with transformers 5 does not read adapters of experts together with those of other MLPs: use MERGE=1 there")
