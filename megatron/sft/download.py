"""Brings a model or a data set to assets/, from the model hub or from a folder or file on this machine.

    python -m megatron.sft.download model Qwen/Qwen2.5-1.5B-Instruct
    python -m megatron.sft.download dataset OWNER/NAME --split train --map-column problem=instruction

Only finished downloads get their final name, and nothing with a final name is ever fetched again or overwritten, because the
user may have edited it (tokenizer files of models often are).
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock

from megatron.sft.data.hub_records import Selection, open_records, write_records
from megatron.sft.hf import hub
from megatron.sft.hf.download_record import RECORD, check_arrived, download_facts
from megatron.sft.hf.names import ASSETS, data_folder_name, model_folder_name, shown
from megatron.sft.hf.published_configs import find_architecture
from megatron.sft.runtime.console import say_next
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import check_free_space, gigabytes, read_json, write_json

# The same weights in other formats, and demonstrations; never needed where safetensors or pytorch_model*.bin exist.
OTHER_FORMATS = (
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ggml", "*.tflite", "*.mlmodel", "*.mlpackage/*"),
    *("onnx/*", "openvino/*", "coreml/*", "original/*", "metal/*", "*.pth", "*.nemo", "flax_model*", "tf_model*"),
)
DUPLICATES_OF_SAFETENSORS = ("*.bin", "*.bin.index.json", "*.pt", "consolidated*")
USUAL_LENGTH = 4096  # of rows, to begin with
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def wanted_files(files: dict[str, int]) -> list[str]:
    """The files of a model repository to fetch: all but second copies of the weights in other formats."""
    skipped = [".git*", *OTHER_FORMATS]
    if any(fnmatch(name, "model*.safetensors") for name in files):
        skipped += DUPLICATES_OF_SAFETENSORS
    return [name for name in files if not any(fnmatch(name, pattern) for pattern in skipped)]


def local_source(kind: str, source: str) -> Path | None:
    """The folder or file that `source` names; None if it is a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    looks_like_path = source.startswith(("/", ".", "~")) or source.count("/") > 1 or re.search(r"\.(json|parquet|csv)", source)
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"{kind} {source} does not exist here and is not a hub id (NAME or OWNER/NAME): check its spelling")
    return None


def one_at_a_time(assets: Path, name: str) -> FileLock:
    """A lock, so that a second process that brings the same thing waits for the first and then finds it there."""
    locks = assets / "cache" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{name}.lock")


def already_there(target: Path, record: Path, asked: Mapping[str, object]) -> bool:
    """Whether `target` exists, from the same source with the same choices; anything else there is a `UserError`.

    asked: by the names in the record; a choice that is None was not made, so it may have any value.
    """
    if not target.exists():
        return False
    if not record.exists():
        if target.is_dir() and not (target / "config.json").exists():
            raise UserError(f"{target} exists but has no config.json: move it away and run the same command again")
        print(f"{shown(target)} is there already, not from a download: using it")
        return True
    found = read_json(record, "download record", f"move {target} away and run the same command again")
    for choice, value in asked.items():
        if value is not None and found.get(choice) != value:
            raise UserError(
                f"{target} exists with {choice} {found.get(choice)}, not {value}: move it away and run the same command again"
            )
    print(f"{shown(target)} is there already: using it (move it away to download it again)")
    return True


def place_model(source: str, revision: str | None, assets: Path) -> Path:
    """Bring a model to assets/checkpoints/<name> and return that folder."""
    folder = assets / "checkpoints"
    local = local_source("model", source)
    if local is not None and local.parent == folder.resolve():
        print(f"{shown(local)} is in its place already: using it")
        return local
    target = folder / model_folder_name(local.name if local else source)
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(assets, target.name):
        asked = {"source": str(local or source), "revision": revision}
        if already_there(target, target / RECORD, asked):
            return target
        if local is not None:
            _copy_model(local, target)
        else:
            _fetch_model(source, revision or "main", target)
    return target


def _fetch_model(id: str, revision: str, target: Path) -> None:
    repository = hub.find_repository("model", id, revision)
    names = wanted_files(repository.files)
    if "config.json" not in names:
        raise UserError(f"model {id} has no config.json at {revision}: it is not a transformers model; choose another id")
    files = {name: repository.files[name] for name in names}
    num_bytes = sum(files.values())
    # The commit is in the name, so that an interrupted download never continues with the files of another revision.
    partial = target.with_name(f".{target.name}.{repository.commit[:12]}.incomplete")
    num_bytes_there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    check_free_space(target.parent, num_bytes - num_bytes_there, f"model {id}")
    partial.mkdir(exist_ok=True)
    skipped = [name for name in repository.files if name not in names and not name.startswith(".git")]
    print(f"downloading {id} at {repository.commit[:12]}: {len(names)} files, {gigabytes(num_bytes)}", flush=True)
    if skipped:
        skipped_bytes = sum(repository.files[name] for name in skipped)
        print(f"skipped, the same weights in other formats: {len(skipped)} files, {gigabytes(skipped_bytes)}")
    hub.fetch_files(repository, names, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's bookkeeping
    record = {
        "source": id,
        "revision": revision,
        "commit": repository.commit,
        "files": files,
        "checksums": download_facts(files, repository.checksums),
    }
    write_json(partial / RECORD, record)
    check_arrived(partial)
    partial.rename(target)
    print(f"saved {shown(target)}")


def _copy_model(source: Path, target: Path) -> None:
    """Weights become hard links where the file system allows it, since nothing edits them; the other files are copies."""
    if not (source / "config.json").is_file():
        raise UserError(f"model folder {source} has no config.json: give a Hugging Face model folder")
    sizes = {str(file.relative_to(source)): file.stat().st_size for file in source.rglob("*") if file.is_file()}
    partial = target.with_name(f".{target.name}.copy.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    linked = 0
    for name in wanted_files(sizes):
        file, copy = (source / name).resolve(), partial / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not any(fnmatch(name, pattern) for pattern in WEIGHTS):
                raise OSError
            os.link(file, copy)
            linked += 1
        except OSError:
            check_free_space(target.parent, sizes[name], name)
            shutil.copy2(file, copy)
    write_json(partial / RECORD, {"source": str(source)})
    partial.rename(target)
    print(f"saved {shown(target)}, a copy of {source}" + (f" ({linked} weight files as hard links)" if linked else ""))


def place_dataset(source: str, selection: Selection, revision: str | None, assets: Path, name: str | None = None) -> Path:
    """Bring a data set to assets/data/<name>/<name>.json as JSON lines and return that file. name: None for the source's."""
    local = local_source("dataset", source)
    name = data_folder_name(name or ((local.stem if local.is_file() else local.name) if local else source))
    target = assets / "data" / name / f"{name}.json"
    if local == target.resolve():
        print(f"{shown(target)} is in its place already: using it")
        return target
    record = {
        "source": str(local or source),
        "revision": revision,
        "config": selection.config,
        "split": selection.split,
        "columns": selection.renamed or None,
    }
    with one_at_a_time(assets, name):
        if already_there(target, target.parent / RECORD, record):
            return target
        records = open_records(local or source, selection, revision or "main", assets / "cache")
        num_records, columns = write_records(records, selection.renamed, target)
        write_json(target.parent / RECORD, {**record, "revision": revision or "main", "rows": num_records})
    print(f"saved {shown(target)}: {num_records:,} records, columns {', '.join(columns)}")
    return target


def renamed_column(text: str) -> tuple[str, str]:
    """`problem=instruction` becomes ("problem", "instruction")."""
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW, as in problem=instruction")
    return old, new


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="download", description=(__doc__ or "").partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="model|dataset")
    model = kinds.add_parser("model", help="a model, to assets/checkpoints")
    dataset = kinds.add_parser("dataset", help="a data set, to assets/data as JSON lines")
    for kind in (model, dataset):
        kind.add_argument("source", metavar="ID|PATH")
        kind.add_argument("--revision", help="a branch, tag or commit; default main")
        kind.add_argument("--assets-dir", type=Path, default=ASSETS)
    dataset.add_argument("--split", default="train")
    dataset.add_argument("--name", help="of its folder and file in assets/data, instead of the source's")
    dataset.add_argument("--config", help="the configuration (subset), where the data set has several")
    dataset.add_argument("--map-column", action="append", type=renamed_column, default=[], metavar="OLD=NEW")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.kind == "model":
        folder = place_model(arguments.source, arguments.revision, arguments.assets_dir)
        say_next(f"next: {shlex.join(['bash', 'scripts/2_convert.sh', str(shown(folder)), '1', '1'])}")
        return 0
    selection = Selection(arguments.split, arguments.config, dict(arguments.map_column))
    file = place_dataset(arguments.source, selection, arguments.revision, arguments.assets_dir, arguments.name)
    say_next(_tokenize_line(file, arguments.assets_dir))
    return 0


def _tokenize_line(file: Path, assets: Path) -> str:
    """How to tokenise this file: with the model that was downloaded last, if there is one."""
    models = [path.parent for path in (assets / "checkpoints").glob("*/tokenizer*.json")]
    if not models:
        return f"then, with a model's folder: bash scripts/3_tokenize.sh MODEL {shlex.quote(str(shown(file)))} {USUAL_LENGTH}"
    model, length = max(models, key=lambda path: path.stat().st_mtime), USUAL_LENGTH
    with contextlib.suppress(UserError):
        length = min(length, find_architecture(str(model))[0].max_positions)
    return f"next: {shlex.join(['bash', 'scripts/3_tokenize.sh', str(shown(model)), str(shown(file)), str(length)])}"


if __name__ == "__main__":
    run(main)
