"""The inputs of a run compared with their manifests: tokenised data and the checkpoint to start from.

`megatron.sft.launch` does it once a node, before the processes start. Sizes and structure are checked every time, checksums
once (see runtime/checksum_cache.py).
"""

import os
from pathlib import Path

from megatron.sft.checkpoint.folder import MANIFEST, Checkpoint
from megatron.sft.data.reference_logps import MAKE_AGAIN
from megatron.sft.data.tokenized import REBUILD, TokenizedRows
from megatron.sft.families.architecture import Architecture
from megatron.sft.model.layout import check_layout
from megatron.sft.planning.reference_plan import ReferencePlan
from megatron.sft.planning.run_plan import RunPlan, architecture_of, check_data_fits
from megatron.sft.runtime.checksum_cache import check_once
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_sizes, listed_files

CONVERT_AGAIN = "run scripts/2_convert.sh again, into another folder"
# Set by the launcher for the processes that it starts after the check.
CHECKED = "MEGATRON_SFT_INPUTS_CHECKED"


def check(plan: RunPlan) -> None:
    """Check data, the start checkpoint of a new run, and the weights under adapters, unless the launcher has done so.

    A difference is a `UserError`.
    """
    if os.environ.get(CHECKED) == "1":
        return
    check_rows(plan.rows, plan.options.save)
    weights = plan.base if plan.resume else plan.start
    if weights is not None:
        check_checkpoint(weights, plan.architecture, plan.options.verify_checkpoint)
    if plan.reference:
        check_reference(plan, plan.reference)


def check_rows(rows: TokenizedRows, save: Path) -> None:
    """Compare the checksums of tokenised data, whose sizes and structure were checked when it was opened.

    save: the folder of the run, where checksums are remembered if the data's own folder cannot be written to.
    """
    prefix = rows.prefix
    caches = (prefix.with_name(f".{prefix.name}.checked.json"), save / ".data.checked.json")
    check_once(rows.files, REBUILD, caches)


def check_reference(plan: RunPlan, reference: ReferencePlan) -> None:
    """Compare the checksums of the reference's log-probabilities; where they are to be made, those of its checkpoint, which
    must fit the data and the layout."""
    options = plan.options
    if reference.logps is not None:
        prefix = reference.logps.prefix
        caches = (prefix.with_name(f".{prefix.name}.checked.json"), options.save / ".reference.checked.json")
        check_once(reference.logps.files, MAKE_AGAIN, caches)
    elif reference.checkpoint is not None and options.reference:
        checkpoint = reference.checkpoint
        architecture = architecture_of(checkpoint)
        try:
            check_layout(plan.layout, architecture)
            check_data_fits(plan.rows, options, architecture, checkpoint.manifest.get("source", {}))
        except UserError as error:
            raise UserError(f"REFERENCE {options.reference}: {error}") from None
        check_checkpoint(checkpoint, architecture, options.verify_checkpoint)


def check_checkpoint(checkpoint: Checkpoint, architecture: Architecture, checksums: bool = True) -> None:
    """Compare a converted checkpoint with its manifest, and that with the model's configuration in it."""
    from megatron.sft.checkpoint.verification import check_checkpoint_manifest
    from megatron.sft.hf.folder import architecture_record

    manifest = checkpoint.path / MANIFEST
    check_checkpoint_manifest(checkpoint.path, checkpoint.manifest, checkpoint.iteration)
    stated = checkpoint.manifest.get("shape", {})
    for name, value in architecture_record(architecture).items():
        if isinstance(value, dict) and isinstance(stated.get(name), dict):
            # Facts that an older manifest does not know are at their defaults.
            value = {fact: value[fact] for fact in value if fact in stated[name]}
        # The weights may have been cast while they were converted.
        if name != "torch_dtype" and name in stated and stated[name] != value:
            raise UserError(
                f"{manifest} has {name} {stated[name]} for the weights and {value} in its configuration: {CONVERT_AGAIN}"
            )
    files = listed_files(checkpoint.path, manifest, checkpoint.manifest.get("files"))
    check_sizes(files, CONVERT_AGAIN)
    if not checksums:
        return
    cache = checkpoint.path.with_name(f".{checkpoint.path.name}.checked.json")
    check_once(files, CONVERT_AGAIN, (cache,))
