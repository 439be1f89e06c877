"""Writes a recipe for a model and data of the user. `bash tools/new_recipe NAME MODEL DATA [LENGTH]` runs

python -m megatron.sft.new_recipe NAME MODEL DATA [LENGTH] [--lora]
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron.sft.data.mixture import parse_inputs
from megatron.sft.data.tokenized import TokenizedRows, data_file
from megatron.sft.hf.names import ASSETS, shown, similar_folder
from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.planning.hints.small_runs import USUAL_EPOCHS, check_positions, fitting_batch, fitting_split
from megatron.sft.runtime.console import say_next
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import write_bytes

ROOT = ASSETS.parent
USUAL_LENGTH, USUAL_BATCH = 4096, 16


def recipe_text(
    name: str, model: Path, data: str, prefix: Path, length: int, batch: int, split: str, lora: bool, pairs: bool
) -> str:
    """The file: head, variables, and the line that hands over to step 4. pairs: the data is of preferences."""
    checkpoint = model.with_name(f"{model.name}_Megatron_TP1PP1")
    adapters = ["", ': "${LORA_RANK:=16}"', ': "${LORA_ALPHA:=32}"', ': "${LORA_TARGETS:=all}"'] if lora else []
    # Pairs take a tenth, and one pass: docs/preferences.md.
    lr = {(False, False): "1e-5", (True, False): "1e-4", (False, True): "1e-6", (True, True): "1e-5"}[lora, pairs]
    min_lr = f"1e-{int(lr[-1]) + 1}"
    lines = [
        "#!/usr/bin/env bash",
        f"# {'LoRA adapters for ' if lora else ''}{model.name} on {'preference pairs of ' if pairs else ''}{Path(data).name}.",
        "#",
        f"#   bash scripts/sft/{name}.sh [train|resume|plan]",
        f"#   bash scripts/cluster/train.sbatch scripts/sft/{name}.sh   # on a SLURM cluster: docs/slurm.md",
        "#",
        "# Before it, once:",
        f"#   {convert_command(model)}",
        f"#   {tokenize_command(model, data, length)}",
        "#",
        "# A variable in the environment overrides the value here; docs/options.md lists all of them.",
        "#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300",
        'for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do '
        "[[ -f $lib/common.sh ]] && break; done",
        "# shellcheck source=scripts/lib/common.sh",
        'source "$lib/common.sh" || exit 2',
        "",
        f': "${{PRETRAIN_CHECKPOINT_PATH:={in_repository(checkpoint)}}}"',
        f': "${{DATA_PATH:={in_repository(prefix)}}}"',
        f': "${{OUTPUT_PATH:=$ROOT/outputs/checkpoints/{name}}}"',
        f': "${{SEQ_LENGTH:={length}}}"',
        ': "${TENSOR_PARALLEL_SIZE:=1}"',
        ': "${PIPELINE_PARALLEL_SIZE:=1}"',
        ': "${RECOMPUTE:=auto}"',
        *adapters,
        "",
        *([': "${OBJECTIVE:=dpo}"'] if pairs else []),
        ': "${MICRO_BATCH_SIZE:=1}"',
        f': "${{GLOBAL_BATCH_SIZE:={batch}}}"',
        f': "${{EPOCHS:={1 if pairs else USUAL_EPOCHS}}}"',
        f': "${{LR:={lr}}}"',
        f': "${{MIN_LR:={min_lr}}}"',
        ': "${LR_WARMUP_FRACTION:=0.05}"',
        "",
        f': "${{SPLIT:={split}}}"',
        f': "${{VALIDATE_AT_START:={int(split != "100,0,0")}}}"',
        ': "${EVAL_INTERVAL:=100}"',
        ': "${SAVE_INTERVALS:=500}"',
        ': "${KEEP_LAST:=2}"',
        "",
        "# shellcheck source=scripts/4_train.sh",
        'source "$ROOT/scripts/4_train.sh"',
    ]
    return "\n".join(lines) + "\n"


def in_repository(path: Path) -> str:
    """A path in a recipe: from $ROOT on if it is in the repository, so that a copy of the repository works."""
    whole = Path(os.path.abspath(path))
    start, rest = ("$ROOT/", whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else ("", whole)
    # What bash reads within "${NAME:=...}", where ' begins a quotation unless another pair of " is around it.
    if "'" in str(rest):
        return '"' + start + re.sub(r'([\\"$`])', r"\\\1", str(rest)) + '"'
    return start + re.sub(r'([\\"$`}])', r"\\\1", str(rest))


def convert_command(model: Path) -> str:
    return shlex.join(["bash", "scripts/2_convert.sh", str(shown(model)), "1", "1"])


def tokenize_command(model: Path, data: str, length: int) -> str:
    return shlex.join(["bash", "scripts/3_tokenize.sh", str(shown(model)), data, str(length)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="new_recipe", description=(__doc__ or "").splitlines()[0])
    for name in ("name", "model", "data"):
        parser.add_argument(name)
    parser.add_argument("length", nargs="?", default="")
    parser.add_argument("--lora", action="store_true")
    asked = parser.parse_args(argv)
    if not re.fullmatch(r"\w[\w.-]*", asked.name):
        raise UserError(f"NAME is {asked.name!r}: give letters, digits, dots, - and _")
    path = ROOT / "scripts" / "sft" / f"{asked.name}.sh"
    if path.exists():
        raise UserError(f"{shown(path)} exists: edit it, or give another NAME")
    model = Path(asked.model.rstrip("/"))
    if not model.is_dir():
        raise UserError(
            f"MODEL {model} is not a folder{similar_folder(model)}: download it with scripts/1_download.sh model ID"
        )
    architecture, where = find_architecture(str(model))
    if asked.length and not (asked.length.isascii() and asked.length.isdigit() and int(asked.length)):
        raise UserError(f"LENGTH is {asked.length!r}: give a whole number of tokens")
    length = int(asked.length or min(USUAL_LENGTH, architecture.max_positions))
    check_positions(length, architecture, where)
    [given] = parse_inputs([asked.data])
    if not given.is_on_hub and not given.path.exists():
        raise UserError(f"DATA {asked.data} does not exist: give the file that scripts/3_tokenize.sh reads")
    prefix = given.folder / f"Tokenized-{given.short_name}-{model.name}-{length}_text_document"
    batch, split, pairs, to_do = USUAL_BATCH, "99,1,0", False, []
    checkpoint = model.with_name(f"{model.name}_Megatron_TP1PP1")
    if not checkpoint.is_dir():
        to_do.append(convert_command(model))
    if data_file(prefix, "json").exists():
        tokenized = TokenizedRows(prefix)
        rows, pairs = len(tokenized), tokenized.num_pairs > 0
        batch, split = min(USUAL_BATCH, fitting_batch(rows)), fitting_split(rows) or "100,0,0"
    else:
        to_do.append(tokenize_command(model, asked.data, length))
    text = recipe_text(asked.name, model, asked.data, prefix, length, batch, split, asked.lora, pairs)
    write_bytes(path, text.encode())
    print(f"wrote {shown(path)}")
    for command in [*to_do, shlex.join(["bash", str(shown(path)), "plan"]), shlex.join(["bash", str(shown(path)), "train"])]:
        say_next(f"next: {command}")
    return 0


if __name__ == "__main__":
    run(main)
