"""Turns chat data into packed rows of tokens with the answers marked as trained.

    python -m megatron.sft.tokenize --tokenizer MODEL_FOLDER --input data.jsonl --seq-length 4096

Writes Tokenized-<data>-<tokenizer>-<length>_text_document.bin, .idx and .json beside the data.
"""

import argparse
import errno
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from megatron.sft.data.chat import ChatTemplate
from megatron.sft.data.conversations import RowReader
from megatron.sft.data.corpus import OVERLONG, Corpus
from megatron.sft.data.encoding import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    Encoded,
    check_tokenizer_folder,
    load_tokenizer,
)
from megatron.sft.data.packing import ALGORITHM, Packing
from megatron.sft.data.preview import colour_wanted, legend, sample_text
from megatron.sft.data.sources import file_format
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import FORMAT, TokenizedRows, file_of, token_dtype
from megatron.sft.errors import UserError, run
from megatron.sft.manifest import sha256_of_file, sha256_of_text

NUM_SAMPLES = 2
MAX_LENGTH = 1 << 24


@dataclass(frozen=True)
class Options:
    """What decides the result, beside the contents of the files."""

    tokenizer: Path
    input: Path
    length: int
    overlong: str
    seed: int
    packing: bool
    group_key: str
    columns: dict[str, str]
    prefix: Path


@dataclass(frozen=True)
class Source:
    """What the data file is."""

    file_format: str
    sha256: str


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all others here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see --help")


def main() -> None:
    options, num_workers = parse_options(sys.argv[1:])
    # Read by the tokenizers library when it first starts its threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(num_workers)
    signal.signal(signal.SIGTERM, stop)
    data_format = file_format(options.input)
    check_tokenizer_folder(options.tokenizer)
    source = Source(data_format, sha256_of_file(options.input))
    fingerprint = fingerprint_of(options, source)
    if is_finished(options.prefix, fingerprint):
        print(f"already tokenised, from the same data, tokenizer and options: {options.prefix}.bin, .idx, .json")
    else:
        try:
            tokenize(options, source, fingerprint)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            folder = options.prefix.parent
            raise UserError(
                f"no space left in {folder}: free some, or use --output-prefix; nothing was written"
            ) from None
    print("next: scripts/4_train.sh")


def stop(signal_number: int, frame: FrameType | None) -> NoReturn:
    """End as an error would, so that temporary files are removed."""
    raise SystemExit(128 + signal_number)


def parse_options(arguments: list[str]) -> tuple[Options, int]:
    """The options and the number of threads, which does not change the result."""
    parser = Parser(prog="tokenize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Hugging Face model")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines or a JSON array")
    parser.add_argument("--seq-length", required=True, help="tokens in a row")
    parser.add_argument("--overlong", choices=OVERLONG, default="drop", help="what to do with longer conversations")
    parser.add_argument("--seed", default="1234", help="decides the order of rows and what shares a row")
    parser.add_argument("--output-prefix", type=Path, help="name of the result, without .bin")
    parser.add_argument("--no-packing", action="store_true", help="one conversation a row")
    parser.add_argument("--group-key", default="", metavar="FIELD", help="rows with the same value of it stay together")
    parser.add_argument("--num-workers", default=str(len(os.sched_getaffinity(0))), help="threads of the tokenizer")
    parser.add_argument("--map-column", nargs="*", default=[], metavar="OLD=NEW", help="rename columns of the data")
    given = parser.parse_args(arguments)
    length = whole_number("LENGTH", given.seq_length, 1, MAX_LENGTH, "the number of tokens in a row, such as 4096")
    seed = whole_number("SEED", given.seed, 0, 1 << 62, "a whole number")
    num_workers = whole_number("NUM_WORKERS", given.num_workers, 1, 4096, "a number of threads")
    tokenizer_name = Path(os.path.abspath(given.tokenizer)).name
    name = f"Tokenized-{given.input.stem}-{tokenizer_name}-{length}_text_document"
    prefix = given.output_prefix or given.input.parent / name
    columns = renamed_columns(given.map_column)
    packing = not given.no_packing
    options = Options(
        given.tokenizer, given.input, length, given.overlong, seed, packing, given.group_key, columns, prefix
    )
    return options, num_workers


def whole_number(name: str, text: str, least: int, most: int, meaning: str) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise UserError(f"{name} is {text!r}: give {meaning} ({least} to {most})")
    return int(text)


def renamed_columns(pairs: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for pair in pairs:
        old, _, new = pair.partition("=")
        if not old or not new or old in columns or new in columns.values():
            raise UserError(f"MAP_COLUMNS has {pair!r}: give OLD=NEW, each name once, such as problem=instruction")
        columns[old] = new
    return columns


def fingerprint_of(options: Options, source: Source) -> str:
    """A hash of all that decides the result: contents of data, tokenizer and template, and the options."""
    paths = [options.tokenizer / name for name in TOKENIZER_FILES]
    files = sorted((path.name, sha256_of_file(path)) for path in paths if path.is_file())
    columns = sorted(options.columns.items())
    chosen = (options.length, options.overlong, options.seed, options.packing, options.group_key, columns)
    return sha256_of_text(repr((FORMAT, ALGORITHM, source.sha256, files, chosen)))


def is_finished(prefix: Path, fingerprint: str) -> bool:
    """Whether a whole result with this fingerprint is in place."""
    if not file_of(prefix, "json").is_file():
        return False
    try:
        finished: bool = TokenizedRows(prefix).manifest.get("fingerprint") == fingerprint
    except UserError as error:
        print(f"tokenising again: {error}")
        return False
    if not finished:
        print(f"tokenising again: {prefix}.json is of other data, another tokenizer or other options")
    return finished


def tokenize(options: Options, source: Source, fingerprint: str) -> None:
    """Read, render, tokenise, pack, write, and say what was done."""
    tokenizer = load_tokenizer(options.tokenizer)
    template = ChatTemplate(tokenizer)
    reader = RowReader(options.columns)
    corpus = Corpus(options.input, template, reader, options.length, options.overlong, options.group_key)
    vocabulary_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    with ConversationStore(options.prefix, token_dtype(vocabulary_size), bool(options.group_key)) as store:
        for conversation in corpus:
            if len(store.lengths) < NUM_SAMPLES:
                print_sample(len(store.lengths) + 1, tokenizer, conversation)
            store.add(conversation)
        print_counts(corpus, source)
        if not corpus.counts.num_kept:
            raise UserError(f"no conversation of {options.input} is left, see the reasons above: nothing was written")
        if corpus.group_key and corpus.counts.num_without_group == corpus.counts.num_read:
            raise UserError(f"GROUP_KEY is {corpus.group_key!r}: no row of {options.input} has that field, correct it")
        packing = store.pack(options.length, options.seed, options.packing)
        manifest = manifest_of(options, corpus, store, packing, source)
        store.write(packing, manifest | {"fingerprint": fingerprint})
    print_groups(store, packing)
    fill = 100 * store.num_tokens / (packing.num_rows * options.length)
    print(f"packed {corpus.counts.num_kept} conversations into {packing.num_rows} rows ({fill:.1f} % full)")
    print(f"trained {100 * store.num_trained / store.num_tokens:.1f} % of {store.num_tokens:,} tokens")
    print(f"wrote {options.prefix}.bin, .idx, .json")
    print(f"look at a row: {show_sample_command(options.prefix)}")


def print_groups(store: ConversationStore, packing: Packing) -> None:
    """How many groups there are, and how many take several rows."""
    if not store.grouped:
        return
    totals = store.totals(packing, 1)
    several = sum(count for size, count in totals.get("row_units", {}).items() if size != "1")
    print(f"{totals['groups']:,} groups; {several:,} of them take several rows, which training keeps together")


def show_sample_command(prefix: Path) -> str:
    root = os.path.relpath(Path(__file__).parents[2])
    python = sys.executable if not sys.executable.startswith(os.getcwd()) else os.path.relpath(sys.executable)
    return f"PYTHONPATH={root} {python} {os.path.normpath(os.path.join(root, 'tools/show_sample.py'))} {prefix} 0"


def manifest_of(
    options: Options, corpus: Corpus, store: ConversationStore, packing: Packing, source: Source
) -> dict[str, Any]:
    template = corpus.template
    return {
        "format": FORMAT,
        **store.totals(packing, options.length),
        "vocab_size": len(template.tokenizer),
        "algorithm": ALGORITHM if options.packing else "none",
        "seed": options.seed,
        "group_key": options.group_key or None,
        "options": {"overlong": options.overlong, "packing": options.packing, "columns": options.columns},
        "tokenizer": tokenizer_facts(options.tokenizer, template),
        "chat_template": template.text,
        "chat_template_sha256": sha256_of_text(template.text),
        "notes": sorted(template.notes),
        "sources": [source_facts(corpus, source)],
    }


def tokenizer_facts(folder: Path, template: ChatTemplate) -> dict[str, Any]:
    """`sha256` is that of tokenizer.json, or of the hashes of the other vocabulary files where there is none."""
    files = [folder / name for name in VOCABULARY_FILES if (folder / name).is_file()]
    hashes = {path.name: sha256_of_file(path) for path in files}
    return {
        "path": str(folder.resolve()),
        "name": Path(os.path.abspath(folder)).name,
        "sha256": hashes.get("tokenizer.json") or sha256_of_text(repr(sorted(hashes.items()))),
        "eos_token_id": template.tokenizer.eos_token_id,
        "bos_token_id": template.tokenizer.bos_token_id,
        "end_of_turn_ids": sorted(template.end_of_turn_ids),
    }


def source_facts(corpus: Corpus, source: Source) -> dict[str, Any]:
    counts = corpus.counts
    return {
        "path": str(corpus.path.resolve()),
        "sha256": source.sha256,
        "format": " and ".join(sorted(corpus.reader.formats)),
        "file_format": source.file_format,
        "read": counts.num_read,
        "kept": counts.num_kept,
        "dropped": dict(counts.dropped),
        "truncated": counts.num_truncated,
        "ignored_fields": dict(corpus.reader.ignored_fields),
    }


def print_sample(number: int, tokenizer: Any, conversation: Encoded) -> None:
    trained = np.repeat(np.arange(len(conversation.runs)) % 2 == 1, conversation.runs)
    colour = colour_wanted()
    print(f"---- sample {number}: {len(trained)} tokens; {legend(colour)} ----")
    print(sample_text(tokenizer, conversation.tokens, trained, colour), flush=True)


def print_counts(corpus: Corpus, source: Source) -> None:
    """Everything that was read, ignored, dropped or cut, once."""
    counts = corpus.counts
    formats = ", ".join(f"{count} {name}" for name, count in sorted(corpus.reader.formats.items()))
    print(f"---- read {counts.num_read} rows of {corpus.path} ({source.file_format}: {formats}) ----")
    for name, count in corpus.reader.ignored_fields.most_common():
        if name == corpus.group_key:
            continue
        print(f"not used: field {name!r} of {count} rows")
    for reason, count in counts.dropped.items():
        print(f"dropped {count} conversations: {reason}")
    if counts.num_truncated:
        print(f"cut {counts.num_truncated} conversations at {corpus.length} tokens: their last answer has no end")
    if corpus.group_key and counts.num_without_group:
        print(f"note: {counts.num_without_group} rows have no field {corpus.group_key!r}: each is a group of its own")
    if counts.num_with_control_tokens:
        count = counts.num_with_control_tokens
        print(f"note: {count} conversations have the chat template's own special tokens in their texts")
    if counts.num_merged_starts:
        print(f"note: {counts.num_merged_starts} answers begin inside a token of the header, which is not trained")
    for note in sorted(corpus.template.notes):
        print(f"note: {note}")


if __name__ == "__main__":
    run(main)
