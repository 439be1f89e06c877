"""The inputs of a run compared with their manifests before any process waits for another: data and start checkpoint.

Sizes and structure are looked at every time, checksums once (see checked_once.py).
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

from megatron.sft.checkpoint.folder import MANIFEST, Checkpoint
from megatron.sft.data.tokenized import REBUILD, TokenizedRows
from megatron.sft.families.architecture import Architecture
from megatron.sft.planning.run_plan import RunPlan
from megatron.sft.runtime import watchdog
from megatron.sft.runtime.checksum_cache import check_once
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import check_sizes, listed_files, write_json

CONVERT_AGAIN = "run scripts/2_convert.sh again, into another folder"
_BEAT_SECONDS = 2.0
# A process that checks for others is given up after so long without a sign of life.
SILENT_SECONDS = 60.0


def check(plan: RunPlan) -> None:
    """Check the run's inputs: the first process of a node does it, the others wait, and all end with the same `UserError`."""
    meeting = _meeting_place()
    if meeting is None or os.environ.get("LOCAL_RANK", "0") == "0":
        _check_and_tell(plan, meeting)
    else:
        _wait(meeting)


def _meeting_place() -> Path | None:
    """The file by which the processes of this node hear of the result; None where there is one process.

    torchrun gives each process an error file in a folder of its own, below one of this node, this run and this attempt.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return None
    return Path(error_file).parent.parent / "inputs.json"


def _check_and_tell(plan: RunPlan, meeting: Path | None) -> None:
    stop, message = threading.Event(), "the process that checks the inputs for this node ended early"

    def beat() -> None:
        while meeting and not stop.wait(_BEAT_SECONDS):
            meeting.with_suffix(".alive").touch()

    threading.Thread(target=beat, daemon=True).start()
    try:
        check_data(plan)
        if not plan.resume:
            check_checkpoint(plan.start, plan.architecture, plan.options.verify_checkpoint)
        message = ""
    except UserError as error:
        message = str(error)
        raise
    finally:
        stop.set()
        if meeting:
            write_json(meeting, {"error": message})


def _wait(meeting: Path) -> None:
    heard = time.monotonic()
    last_beat = 0
    while not meeting.exists():
        watchdog.enter("check of the inputs")
        with contextlib.suppress(FileNotFoundError):
            beat = meeting.with_suffix(".alive").stat().st_mtime_ns
            heard = time.monotonic() if beat != last_beat else heard
            last_beat = beat
        if time.monotonic() - heard > SILENT_SECONDS:
            raise UserError(
                f"local rank 0, which checks the inputs, was silent for {SILENT_SECONDS:.0f} s: start again"
            )
        time.sleep(0.05)
    message = json.loads(meeting.read_text())["error"]
    if message:
        raise UserError(message)


def check_data(plan: RunPlan) -> None:
    """Compare the checksums of the tokenised data, whose sizes and structure were checked when they were opened."""
    check_rows(plan.rows, plan.options.save)


def check_rows(rows: TokenizedRows, save: Path) -> None:
    """`check_data` of these rows, for a run in the folder `save`."""
    prefix = rows.prefix
    memories = (prefix.with_name(f".{prefix.name}.checked.json"), save / ".data.checked.json")
    check_once(rows.files, REBUILD, memories)


def check_checkpoint(checkpoint: Checkpoint, architecture: Architecture, checksums: bool = True) -> None:
    """Compare a converted checkpoint with its manifest, and that with the model's configuration in it."""
    from megatron.sft.checkpoint.verification import check_checkpoint_manifest
    from megatron.sft.hf.folder import architecture_record

    manifest = checkpoint.path / MANIFEST
    check_checkpoint_manifest(checkpoint.path, checkpoint.manifest, checkpoint.iteration)
    stated = checkpoint.manifest.get("shape", {})
    for name, value in architecture_record(architecture).items():
        # The weights may have been cast while they were converted.
        if name != "torch_dtype" and name in stated and stated[name] != value:
            raise UserError(
                f"{manifest} has {name} {stated[name]} for the weights and {value} in its configuration: {CONVERT_AGAIN}"
            )
    files = listed_files(checkpoint.path, manifest, checkpoint.manifest.get("files"))
    check_sizes(files, CONVERT_AGAIN)
    if not checksums:
        return
    beside = checkpoint.path.with_name(f".{checkpoint.path.name}.checked.json")
    check_once(files, CONVERT_AGAIN, (beside,))
