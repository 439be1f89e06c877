"""Turns chat data into packed rows of tokens with the answers marked as trained.

    python -m megatron.sft.tokenize --tokenizer MODEL_FOLDER --input data.jsonl --seq-length 4096

Writes Tokenized-<data>-<tokenizer>-<length>_text_document.bin, .idx and .json next to the data.
"""

import contextlib
import errno
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from megatron.sft.chat.conversations import RecordReader, renamed_columns
from megatron.sft.chat.corrections import EMPTY_THINK, difference
from megatron.sft.chat.encoding import TOKENIZER_FILES, check_tokenizer_folder, load_tokenizer
from megatron.sft.chat.template import TRAIN_ON, ChatTemplate, CorrectionNeeded, templates_of
from megatron.sft.chat.template_settings import NAMES, chosen_template, read_arguments, read_date, with_defaults
from megatron.sft.data.corpus import OVERLONG, Corpus
from megatron.sft.data.mixture import Input, Source, parse_inputs, validated_source
from megatron.sft.data.packing import ALGORITHM
from megatron.sft.data.report import (
    RejectedRecords,
    length_facts,
    lengths_line,
    nothing_left,
    placeholder_notes,
    print_corpus,
    print_sample,
    print_totals,
    source_facts,
    tokenizer_facts,
)
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import FORMAT, TokenizedRows, is_finished, token_dtype
from megatron.sft.hf.names import shown
from megatron.sft.hf.tokenizer import auto_tokenizer_note
from megatron.sft.planning.hints.small_runs import check_positions, data_notes
from megatron.sft.runtime.console import say_next
from megatron.sft.runtime.errors import OneLineParser, UserError, run
from megatron.sft.runtime.manifest import read_json, sha256_of_file, sha256_of_text

NUM_SAMPLES = 2
MAX_SEQ_LENGTH = 1 << 24


@dataclass(frozen=True)
class Options:
    """What decides the result, apart from the contents of the files."""

    tokenizer: Path
    inputs: tuple[Input, ...]
    seq_length: int
    overlong: str
    seed: int
    packing: bool
    group_key: str
    columns: dict[str, str]
    train_on: str
    chat_template: str  # a name or a file; the tokenizer's own if empty
    empty_think: str
    template_date: date | None  # None: the day on which the run starts
    template_kwargs: dict[str, Any]  # of all records
    skip_bad_records: bool
    ignores_unknown: bool
    replaced: dict[str, str | None]  # placeholders in the data, and what they stand for
    prefix: Path
    num_workers: int  # does not change the result


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    # Read by the tokenizers library: records are distributed to processes, so threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # End as an error would, so that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    check_tokenizer_folder(options.tokenizer)
    _check_length(options)
    template = chosen_template(options.chat_template) if options.chat_template else ""
    sources = [validated_source(input) for input in options.inputs]
    fingerprint = _fingerprint(options, sources, template)
    if is_finished(options.prefix, fingerprint):
        print(f"already tokenised, from the same data, tokenizer and options:\n{options.prefix}.bin, .idx, .json")
        if facts := TokenizedRows(options.prefix).manifest.get("read_lengths"):
            print(lengths_line(facts))
    else:
        try:
            tokenize_with_corrections(options, sources, template, fingerprint)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            folder = options.prefix.parent
            raise UserError(
                f"no space left in {folder}: free some, or set OUTPUT_PREFIX (--output-prefix); nothing was written"
            ) from None
    _say_next(options)
    return 0


def _say_next(options: Options) -> None:
    """What the data is too small for, and the command that comes next."""
    manifest = TokenizedRows(options.prefix).manifest
    for note in data_notes(manifest["rows"], manifest["conversations"]):
        say_next(f"note: {note}")
    model, source = options.tokenizer, options.inputs[0].name
    if not (model / "config.json").is_file() or len(options.inputs) > 1:
        what = "in a recipe of scripts/sft/"
        if "pairs" in manifest:
            what = "and OBJECTIVE=dpo in a recipe, such as scripts/dpo/DPO_Qwen2.5.sh"
        say_next(f"then: set DATA_PATH={shlex.quote(str(options.prefix))} {what}")
    else:
        name = re.sub(r"[^\w.-]+", "_", f"{options.inputs[0].short_name}_{model.name}")
        command = ["bash", "tools/new_recipe", name, shown(model), source, str(options.seq_length)]
        say_next(f"next: {shlex.join(command)}")


def _check_length(options: Options) -> None:
    """Rows longer than the model's positions are refused now; a model that is not known here is checked when it trains."""
    path = options.tokenizer / "config.json"
    with contextlib.suppress(UserError):
        from megatron.sft.families.registry import read_architecture  # with torch, which takes seconds

        architecture = read_architecture(read_json(path, "model configuration", ""), str(path))
        path = options.tokenizer
    if path == options.tokenizer:
        check_positions(options.seq_length, architecture, f"{path / 'config.json'}")


def parse_options(argv: Sequence[str] | None) -> Options:
    parser = OneLineParser(prog="tokenize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Hugging Face model")
    parser.add_argument(
        "--input", action="append", required=True, help="files, folders or hub ids, each with #500 or #20%% to sample it"
    )
    parser.add_argument("--seq-length", required=True, help="tokens in a row")
    parser.add_argument("--overlong", choices=OVERLONG, default="drop", help="what to do with longer conversations")
    parser.add_argument("--seed", default="1234", help="decides the order of rows and what shares a row")
    parser.add_argument("--output-prefix", type=Path, help="name of the result, without .bin")
    parser.add_argument("--no-packing", action="store_true", help="one conversation a row")
    parser.add_argument("--group-key", default="", metavar="FIELD", help="records with the same value of it stay together")
    parser.add_argument("--num-workers", default=str(len(os.sched_getaffinity(0))), help="worker processes")
    parser.add_argument("--map-column", nargs="*", default=[], metavar="OLD=NEW", help="rename columns; OLD=- drops one")
    _add_template_options(parser)
    parser.add_argument("--bad-rows", choices=("stop", "skip"), default="stop", help="skip: set them aside and continue")
    parser.add_argument(
        "--unknown-fields", choices=("stop", "ignore"), default="stop", help="of the data: ignore and count them"
    )
    parser.add_argument("--model-name", help="what {{NAME}} in the data stands for")
    parser.add_argument("--model-author", help="what {{AUTHOR}} in the data stands for")
    given = parser.parse_args(argv)
    seq_length = whole_number("LENGTH", given.seq_length, 1, MAX_SEQ_LENGTH, "the tokens in a row, such as 4096")
    seed = whole_number("SEED", given.seed, 0, 1 << 62, "a whole number")
    num_workers = whole_number("NUM_WORKERS", given.num_workers, 1, 4096, "a number of worker processes")
    tokenizer_name = Path(os.path.abspath(given.tokenizer)).name
    inputs = tuple(parse_inputs(given.input))
    name = f"Tokenized-{inputs[0].short_name}-{tokenizer_name}-{seq_length}_text_document"
    return Options(
        tokenizer=given.tokenizer,
        inputs=inputs,
        seq_length=seq_length,
        overlong=given.overlong,
        seed=seed,
        packing=not given.no_packing,
        group_key=given.group_key,
        columns=renamed_columns(given.map_column),
        train_on=given.train_on,
        chat_template=given.chat_template,
        empty_think=given.empty_think,
        template_date=read_date(given.template_date),
        template_kwargs=read_arguments(given.template_kwargs),
        skip_bad_records=given.bad_rows == "skip",
        ignores_unknown=given.unknown_fields == "ignore",
        replaced={"{{NAME}}": given.model_name, "{{AUTHOR}}": given.model_author},
        prefix=given.output_prefix or inputs[0].folder / name,
        num_workers=num_workers,
    )


def _add_template_options(parser: OneLineParser) -> None:
    parser.add_argument("--train-on", choices=TRAIN_ON, default=TRAIN_ON[0], help="which turns are trained")
    parser.add_argument("--chat-template", default="", help=f"a file, or one of {', '.join(NAMES)}")
    parser.add_argument(
        "--empty-think",
        choices=tuple(EMPTY_THINK),
        default="every",
        help="which answers without reasoning get the template's empty <think> block",
    )
    parser.add_argument("--template-date", default="", metavar="YYYY-MM-DD", help="the date that a template prints")
    parser.add_argument("--template-kwargs", default="", metavar="JSON", help="arguments for the chat template")


def whole_number(name: str, text: str, least: int, most: int, meaning: str) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise UserError(f"{name} is {text!r}: give {meaning} ({least} to {most})")
    return int(text)


def _fingerprint(options: Options, sources: list[Source], template: str) -> str:
    """A hash of all that decides the result: contents of data, tokenizer and template, and the options."""
    paths = [options.tokenizer / name for name in TOKENIZER_FILES]
    paths += options.tokenizer.glob("additional_chat_templates/*.jinja")
    files = sorted((path.name, sha256_of_file(path)) for path in paths if path.is_file())
    columns = sorted(options.columns.items())
    data = [(source.sha256, source.wanted, options.ignores_unknown) for source in sources]
    chosen = (options.seq_length, options.overlong, options.seed, options.packing, options.group_key, columns)
    more = (options.train_on, template, options.skip_bad_records, sorted(options.replaced.items()))
    rendering = (options.empty_think, str(options.template_date), json.dumps(options.template_kwargs, sort_keys=True))
    return sha256_of_text(repr((FORMAT, ALGORITHM, data, files, chosen, more, rendering)))


def tokenize_with_corrections(options: Options, sources: list[Source], text: str, fingerprint: str) -> None:
    """Tokenise with the chosen template (`text`, empty for the tokenizer's own). Where it does not print what is in the data
    but a known correction of it does, start again with that."""
    tokenizer = load_tokenizer(options.tokenizer, template_needed=False)
    own = templates_of(tokenizer)
    chosen = (text, text if own[1] else "") if text else own
    texts = [with_defaults(template, options.template_kwargs) for template in chosen]
    day = options.template_date or date.today()
    note = auto_tokenizer_note(options.tokenizer, tokenizer)
    while True:
        template = ChatTemplate(tokenizer, texts[0], options.train_on, texts[1], options.empty_think, day)
        template.notes.update(filter(None, [note]))
        try:
            tokenize(options, sources, template, own, fingerprint)
        except CorrectionNeeded as needed:
            # Every correction is made only once, so this ends.
            print(f"---- the chat template is corrected, as {needed.reason.partition(': give another')[0]} ----")
            corrected = [needed.template, needed.tool_template]
            print(*filter(None, map(difference, texts, corrected)), sep="\n", flush=True)
            texts = corrected
        else:
            return


def tokenize(options: Options, sources: list[Source], template: ChatTemplate, own: tuple[str, str], fingerprint: str) -> None:
    """Read, render, tokenise, pack, write, and print what was done. `own` are the tokenizer's own templates."""
    tokenizer = template.tokenizer
    vocabulary_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    rejected_path = options.prefix.parent / f"{options.inputs[0].short_name}.rejected.jsonl"
    with (
        ConversationStore(options.prefix, token_dtype(vocabulary_size), bool(options.group_key), len(sources)) as store,
        RejectedRecords(rejected_path) as rejected,
    ):
        kinds: dict[str, str] = {}
        corpora = [_corpus(options, source, index, template, rejected, kinds) for index, source in enumerate(sources)]
        for corpus in corpora:
            for unit in corpus:
                if store.num_units < NUM_SAMPLES:
                    print_sample(store.num_units + 1, tokenizer, unit)
                store.add(*((replace(one, source=corpus.index) for one in unit) if corpus.index else unit))
            print_corpus(corpus)
        for note in [*placeholder_notes(options.replaced, corpora), *sorted(template.notes)]:
            print(f"note: {note}")
        if options.skip_bad_records:
            rejected.keep()
        if not any(corpus.counts.num_kept for corpus in corpora):
            raise nothing_left(", ".join(input.name for input in options.inputs), corpora)
        if options.group_key and all(corpus.counts.num_without_group == corpus.counts.num_read for corpus in corpora):
            raise UserError(f"GROUP_KEY is {options.group_key!r}: no record of the data has that field, correct it")
        packing = store.pack(options.seq_length, options.seed, options.packing)
        totals = store.totals(packing, options.seq_length) | {"read_lengths": length_facts(corpora)}
        store.write(packing, totals | _manifest(options, corpora, own) | {"fingerprint": fingerprint})
    print_totals(totals)
    if rejected.num_records:
        print(f"bad records: {rejected.num_records}, with the reasons in {rejected_path}")
    print(f"wrote {options.prefix}.bin, .idx, .json")
    show_sample = os.path.relpath(Path(__file__).parents[2] / "tools/show_sample")
    print(f"look at a row: {shlex.join([show_sample, str(options.prefix), '0'])}")


def _corpus(
    options: Options, source: Source, index: int, template: ChatTemplate, rejected: RejectedRecords, kinds: dict[str, str]
) -> Corpus:
    return Corpus(
        source,
        template,
        RecordReader(options.columns, options.replaced, options.ignores_unknown, frozenset({options.group_key})),
        options.seq_length,
        options.overlong,
        options.group_key,
        options.seed,
        index,
        rejected.add if options.skip_bad_records else None,
        options.num_workers,
        kinds=kinds,
    )


def _manifest(options: Options, corpora: list[Corpus], own: tuple[str, str]) -> dict[str, Any]:
    """What the manifest says of options, tokenizer, template and sources."""
    template = corpora[0].template
    return {
        "format": FORMAT,
        "vocab_size": len(template.tokenizer),
        "algorithm": ALGORITHM if options.packing else "none",
        "seed": options.seed,
        "group_key": options.group_key or None,
        "options": {"overlong": options.overlong, "packing": options.packing, "columns": options.columns},
        "train_on": options.train_on,
        "bad_rows": "skip" if options.skip_bad_records else "stop",
        "unknown_fields": "ignore" if options.ignores_unknown else "stop",
        # What training compares with the model's. The folder's own chat template may differ from the one used.
        "tokenizer": tokenizer_facts(options.tokenizer, template),
        **template.facts(own),
        "template_kwargs": options.template_kwargs,
        "notes": sorted(template.notes),
        "sources": [source_facts(corpus) for corpus in corpora],
    }


if __name__ == "__main__":
    run(main)
