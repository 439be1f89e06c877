"""Which model a run of pairs is held to, and where that reference's log-probabilities are, or will be made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.sft.checkpoint.adapter_record import base_checksum, refuse_adapters
from megatron.sft.checkpoint.folder import Checkpoint, open_checkpoint
from megatron.sft.data.reference_logps import ReferenceLogps, checkpoint_seal, data_seal
from megatron.sft.data.tokenized import TokenizedRows, data_file, data_prefix
from megatron.sft.model.layout import Layout
from megatron.sft.planning.options import TrainOptions
from megatron.sft.runtime import device
from megatron.sft.runtime.errors import UserError


@dataclass(frozen=True)
class ReferencePlan:
    """wanted: the `reference_of` of the log-probabilities: model, data, precision. places: prefixes where they may be; they are
    made in the first one that can be written to. logps: None where they are to be made. checkpoint: None for a resumed run
    whose reference is not there any more. is_start: whether the reference is the model that the run starts from.
    """

    wanted: dict[str, Any]
    places: tuple[Path, ...]
    logps: ReferenceLogps | None
    checkpoint: Checkpoint | None
    is_start: bool

    @property
    def words(self) -> str:
        """For people: the model, and where its log-probabilities are."""
        where = self.logps.prefix if self.logps else self.places[0]
        state = "log-probabilities in" if self.logps else "log-probabilities are made first, in"
        return f"{self.wanted['checkpoint']['path']}, {state} {where}"


def plan_reference(
    options: TrainOptions, rows: TokenizedRows, start: Checkpoint, resume: bool, replace: bool = False
) -> ReferencePlan:
    """The reference of a run that begins from `start`. Log-probabilities at its places that are of something else are a
    `UserError`, unless they are to be replaced.
    """
    saved = start.manifest.get("training", {}).get("reference") if resume else None
    try:
        checkpoint = open_checkpoint(Path(options.reference) if options.reference else options.load)
        refuse_adapters(checkpoint)
    except UserError as error:
        if options.reference and not saved:
            raise UserError(f"REFERENCE: {error}") from None
        if not saved:
            raise
        checkpoint = None
    precision = f"fp8 {options.fp8_recipe}" if options.precision == "fp8" else options.precision
    if checkpoint is None or (saved and not options.reference):
        # A resumed run keeps the reference that it began with, unless REFERENCE names another one.
        assert saved is not None
        wanted = {"data": data_seal(rows), **saved}
    else:
        own = checkpoint_seal(checkpoint.path, base_checksum(checkpoint))
        wanted = {"data": data_seal(rows), "checkpoint": own, "precision": precision}
    is_start = not resume and wanted["checkpoint"]["sha256"] == base_checksum(start)
    places = reference_places(options, rows)
    logps = None if replace else _found(places, rows, wanted)
    return ReferencePlan(wanted, places, logps, checkpoint, is_start)


def reference_places(options: TrainOptions, rows: TokenizedRows) -> tuple[Path, ...]:
    """Prefixes where log-probabilities may be: REFERENCE_LOGPS, or next to the data and in the folder of the run."""
    if options.reference_logps:
        return (data_prefix(Path(options.reference_logps)),)
    return rows.prefix.with_name(f"{rows.prefix.name}.reference"), options.save / "reference"


def _found(places: tuple[Path, ...], rows: TokenizedRows, wanted: dict[str, Any]) -> ReferenceLogps | None:
    """The log-probabilities that are wanted. What stands in their place instead is a `UserError` if there are none."""
    problems = []
    for prefix in places:
        if not data_file(prefix, "json").exists():
            continue
        try:
            logps = ReferenceLogps(prefix, rows)
            logps.check_made_for(wanted)
            return logps
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return None


def made_with(layout: Layout) -> dict[str, Any]:
    """What the last digits of log-probabilities depend on."""
    names = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel")
    return {**{name: getattr(layout, name) for name in names}, "device": device.device_name()}


def check_made_here(logps: ReferenceLogps, layout: Layout) -> None:
    """A `UserError` for log-probabilities that were made in another layout or on another device. They can be trained with; who
    asks for them to be made gets new ones."""
    made, here = logps.manifest.get("made_with", {}), made_with(layout)
    changed = [f"{name} {made.get(name)}, now {value}" for name, value in here.items() if made.get(name) != value]
    if changed:
        raise UserError(f"{data_file(logps.prefix, 'json')} was made with {'; '.join(changed)}")


def made_logps(prefix: Path, rows: TokenizedRows, wanted: dict[str, Any]) -> ReferenceLogps:
    """Log-probabilities that have just been made."""
    logps = ReferenceLogps(prefix, rows)
    logps.check_made_for(wanted)
    return logps
