"""Preference data through the scripts: mixed from several formats and files, by several workers, packed again and shown."""

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.data.row_order import split_rows
from megatron.sft.data.tokenized import TokenizedRows
from tests.support.fork_server import SERVER
from tests.support.material import npm_tokenizer, reasoning_gym_rows

ROOT = Path(__file__).parents[2]
NAME = "Tokenized-trl-tokenizer-qwen3-1024_text_document"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def records() -> Iterator[tuple[str, str, str]]:
    """Questions with their right answer and another question's."""
    rows = reasoning_gym_rows(301)
    for row, other in pairwise(rows):
        if row["output"] != other["output"]:
            yield row["instruction"], row["output"], other["output"]


def write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def script(folder: Path, *line: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", *map(str, line)]
    environment = os.environ | SERVER.python() | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in two files: TRL's whole conversations, and OpenAI's; and a file of conversations."""
    folder = tmp_path_factory.mktemp("pairs")
    triples = list(records())
    half = len(triples) // 2
    write(
        folder / "trl.jsonl",
        [
            {side: [turn("user", question), turn("assistant", text)] for side, text in (("chosen", good), ("rejected", bad))}
            for question, good, bad in triples[:half]
        ],
    )
    write(
        folder / "openai.jsonl",
        [
            {
                "input": {"messages": [turn("user", question)]},
                "preferred_output": [turn("assistant", good)],
                "non_preferred_output": [turn("assistant", bad)],
            }
            for question, good, bad in triples[half:]
        ],
    )
    write(folder / "sft.jsonl", [{"instruction": question, "output": good} for question, good, _ in triples[:5]])
    return folder


def test_pairs_are_mixed_packed_and_shown_as_pairs(folder: Path) -> None:
    triples = {question: (good, bad) for question, good, bad in records()}
    tokenize, qwen3 = ROOT / "scripts/3_tokenize.sh", npm_tokenizer("qwen3")
    result = script(folder, tokenize, qwen3, "trl.jsonl openai.jsonl#50%", 1024, NUM_WORKERS="2")
    assert result.returncode == 0, result.stderr
    assert " and OBJECTIVE=dpo in a recipe, such as scripts/dpo/" in result.stdout.splitlines()[-1]
    rows = TokenizedRows(folder / NAME)
    first, second = rows.manifest["sources"]
    assert rows.num_pairs == first["kept"] + second["kept"]
    assert (first["format"], second["format"]) == ("chosen/rejected", "messages/preferred_output/non_preferred_output")
    assert second["read"] == round(second["rows"] / 2)

    # Every pair is a question's two answers, of one source, next to each other.
    tokenizer = load_tokenizer(qwen3)
    seen = set()
    for row in rows:
        texts = []
        for start, stop in row.spans.tolist():
            tokens, trained = row.tokens[start:stop], row.trained[start:stop]
            head, answer = tokenizer.decode(tokens[~trained]), tokenizer.decode(tokens[trained])
            question = head.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n\n")
            texts.append((question, answer.removeprefix("<think>\n\n</think>\n\n").removesuffix("<|im_end|>")))
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            assert chosen[0] == rejected[0] and (chosen[1], rejected[1]) == triples[chosen[0]]
            seen.add(chosen[0])
        assert row.sources is not None and np.array_equal(row.sources[::2], row.sources[1::2])
    assert len(seen) == rows.num_pairs
    training, validation = split_rows(len(rows), 0.8, 0.2, seed=1, continues_group=rows.continues_group)
    assert len(training) + len(validation) == len(rows)

    # The number of workers changes no byte, and the same again is not done again.
    alone = script(folder, tokenize, qwen3, "trl.jsonl openai.jsonl#50%", 1024, NUM_WORKERS="1", OUTPUT_PREFIX="alone")
    assert alone.returncode == 0, alone.stderr
    for ending in ("bin", "idx", "sources"):
        assert (folder / f"alone.{ending}").read_bytes() == (folder / f"{NAME}.{ending}").read_bytes()
    again = script(folder, tokenize, qwen3, "trl.jsonl openai.jsonl#50%", 1024, NUM_WORKERS="2")
    assert again.stdout.startswith("already tokenised") and again.stdout.splitlines()[-1].startswith("then: set DATA_PATH=")
    assert "lengths of pairs, both sides together" in again.stdout

    repacked = script(folder, ROOT / "tools/repack", NAME, "--seq-length", "512")
    assert repacked.returncode == 0, repacked.stderr
    shorter = TokenizedRows(folder / NAME.replace("1024", "512"))
    assert shorter.num_pairs == rows.num_pairs - sum(shorter.manifest["repacked"][0]["dropped"].values()) > 0
    assert all(len(row.conversation_lengths) % 2 == 0 for row in shorter)
    shown = script(folder, ROOT / "tools/show_sample", NAME, "0")
    assert shown.stdout.count(", prompt: ") == shown.stdout.count("---- rejected: ") == len(rows[0].spans) // 2


def test_pairs_and_conversations_in_one_data_set_are_refused_by_name(folder: Path) -> None:
    line = (ROOT / "scripts/3_tokenize.sh", npm_tokenizer("qwen3"))
    result = script(folder, *line, "openai.jsonl sft.jsonl", 1024, OUTPUT_PREFIX="mixed", BAD_ROWS="skip")
    assert result.returncode == 2
    (message,) = result.stderr.splitlines()
    assert "sft.jsonl, line 1 is a conversation, and " in message and "openai.jsonl, line 1 a preference pair" in message
    assert not list(folder.glob("*mixed*"))
    result = script(folder, *line, "openai.jsonl", 1024, OUTPUT_PREFIX="mixed", OVERLONG="split")
    assert result.returncode == 2 and "OVERLONG=split, but " in result.stderr
    assert not list(folder.glob("*mixed*"))
