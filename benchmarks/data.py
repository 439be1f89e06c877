"""Compares the data step with bare tokenising: records a second of both, with the same records, tokenizer and processors.

    python -m benchmarks.data TOKENIZER_FOLDER FILE

The step is everything from the file to the finished .bin, .idx and .json: reading, rendering, masks, checks, packing, writing.
Bare tokenising is one encode_batch of the rendered texts, which are in memory already, with the tokenizers library's threads.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.sft.chat.bpe_cache import word_encoder
from megatron.sft.chat.conversations import RecordReader
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.chat.template import ChatTemplate
from megatron.sft.data import corpus
from megatron.sft.data.mixture import Source, parse_inputs, validated_source
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import FORMAT, token_dtype
from megatron.sft.runtime.errors import OneLineParser, run


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    os.environ["RAYON_NUM_THREADS"] = str(given.num_workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(given.tokenizer)
    (source,) = map(validated_source, parse_inputs([given.file]))
    template = ChatTemplate(tokenizer)
    reader = RecordReader()
    examples = [reader.example(record.fields) for record in source.records(0, 0)]
    texts = [template.render(example.messages, example.tools, example.loss_flags).text for example in examples]
    num_megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} records, {num_megabytes:.1f} MB of text, {given.num_workers} processors, {given.tokenizer.name}")
    if given.library:
        corpus.BYTES_FOR_WORDS = 1 << 60
    ratios = []
    for turn in range(1, given.repeat + 1):
        # Every run of the step starts without knowledge of the template's and the tokenizer's words.
        word_encoder.cache_clear()
        bare = len(texts) / _seconds_of_encoding(tokenizer, texts)
        whole = len(texts) / _seconds_of_step(tokenizer, source, given.seq_length, given.num_workers)
        ratios.append(whole / bare)
        print(f"{turn}: bare encode_batch {bare:,.0f} records/s, the whole step {whole:,.0f} records/s, ratio {ratios[-1]:.2f}")
    print(f"ratio {sorted(ratios)[len(ratios) // 2]:.2f} (the middle of {len(ratios)}), peak memory {_peak_memory()}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="benchmark_data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("file", help="chat data")
    parser.add_argument("--seq-length", type=int, default=16384, help="tokens in a row")
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)), help="processors for each")
    parser.add_argument("--library", action="store_true", help="encode with the tokenizers library alone")
    parser.add_argument("--repeat", type=int, default=3, help="how often both are measured, in turn")
    return parser.parse_args(argv)


def _seconds_of_encoding(tokenizer: Any, texts: list[str]) -> float:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    started = time.monotonic()
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    seconds = time.monotonic() - started
    assert len(encodings) == len(texts)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return seconds


def _seconds_of_step(tokenizer: Any, source: Source, length: int, num_workers: int) -> float:
    started = time.monotonic()
    units = corpus.Corpus(source, ChatTemplate(tokenizer), RecordReader(), length, "truncate", num_workers=num_workers)
    dtype = token_dtype(max(tokenizer.get_vocab().values()) + 1)
    with tempfile.TemporaryDirectory() as folder, ConversationStore(Path(folder) / "data", dtype) as store:
        for unit in units:
            store.add(*unit)
        packing = store.pack(length, 1234, packing=True)
        store.write(packing, {"format": FORMAT} | store.totals(packing, length))
        return time.monotonic() - started


def _peak_memory() -> str:
    usages = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return f"{usages[0]:,.0f} MB (all texts included), {usages[1]:,.0f} MB in the largest worker"


if __name__ == "__main__":
    run(main)
