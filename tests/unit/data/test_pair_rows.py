"""Rows of preference pairs: both sides in one row, packed, packed again, cut; files with half of a pair."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.sft import repack
from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.counts import Counts, fitting
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import TokenizedRows, data_file, token_dtype
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed
from tests.unit.data.test_pairs import conversations, here

Sides = tuple[tuple[bytes, bytes], tuple[bytes, bytes]]  # tokens and mask of chosen, and of rejected


def pairs_of(rows: TokenizedRows) -> "Counter[Sides]":
    """The pairs of all rows by their contents."""
    found: Counter[Sides] = Counter()
    for row in rows:
        sides = [(tokens.tobytes(), trained.tobytes()) for tokens, trained in conversations(row)]
        found.update(zip(sides[::2], sides[1::2], strict=True))
    return found


def random_store(prefix: Path, length: int, grouped: bool, packing: bool, num_pairs: int = 200) -> TokenizedRows:
    """Pairs of random lengths. The first token of a conversation is twice the number of its pair, plus one if rejected."""
    random = np.random.default_rng(length + grouped)
    with ConversationStore(prefix, token_dtype(60_000), grouped) as store:
        for index in range(num_pairs):
            sizes = random.integers(2, length // 2 + 1, 2).tolist()
            unit = [Conversation(np.full(n, 2 * index + side), [1, n - 1], group=index // 3) for side, n in enumerate(sizes)]
            store.add(*unit)
        packed = store.pack(length, 7, packing)
        facts = {"format": 1, "seed": 7, "options": {"overlong": "drop"}, "fingerprint": "of tokenising"}
        store.write(packed, facts | store.totals(packed, length))
    return TokenizedRows(prefix)


def check_pairs(rows: TokenizedRows, length: int) -> list[int]:
    """Whole pairs in every row, in order; the numbers of the pairs, row by row."""
    numbers: list[int] = []
    for row in rows:
        assert len(row.tokens) <= length
        firsts = [int(tokens[0]) for tokens, _ in conversations(row)]
        assert [first % 2 for first in firsts] == [0, 1] * (len(firsts) // 2)
        assert [first // 2 for first in firsts[::2]] == [first // 2 for first in firsts[1::2]]
        numbers += [first // 2 for first in firsts[::2]]
    return numbers


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("length", [10, 37, 400])
def test_both_sides_of_a_pair_are_in_one_row_and_follow_each_other(
    tmp_path: Path, length: int, packing: bool, grouped: bool
) -> None:
    rows = random_store(tmp_path / "data", length, grouped, packing)
    numbers = check_pairs(rows, length)
    assert sorted(numbers) == list(range(200)) and rows.num_pairs == 200
    assert rows.manifest["conversations"] == 400 and rows.manifest["tokens"] == sum(len(row.tokens) for row in rows)
    sides = rows.manifest["sides"]
    assert sum(side["tokens"] for side in sides.values()) == rows.manifest["tokens"]
    assert sum(side["trained_tokens"] for side in sides.values()) == rows.manifest["trained_tokens"]
    assert sides["chosen"]["tokens"] == sum(len(tokens) for row in rows for tokens, _ in conversations(row)[::2])
    if not packing:
        assert len(rows) == 200
    elif not grouped:
        assert rows.manifest["fill"] > 0.8
    if grouped:  # in units of rows that training keeps together
        units = np.repeat(np.cumsum(~rows.continues_group), [len(row.conversation_lengths) // 2 for row in rows])
        assert all(len(set(units[np.array(numbers) // 3 == group])) == 1 for group in range(67))
        assert rows.groups is not None and np.array_equal(rows.groups[::2], rows.groups[1::2])


@pytest.mark.parametrize("grouped", [False, True])
def test_packing_again_moves_pairs_and_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], grouped: bool
) -> None:
    source = random_store(tmp_path / "Tokenized-a-40_text_document", 40, grouped, packing=True)
    before = pairs_of(source)
    assert here(monkeypatch, repack.main, source.prefix, "--seq-length", 100, "--seed", 3) == 0
    assert "packed 200 pairs into" in capsys.readouterr().out
    longer = TokenizedRows(tmp_path / "Tokenized-a-100_text_document")
    assert pairs_of(longer) == before
    assert sorted(check_pairs(longer, 100)) == list(range(200))
    assert (longer.num_pairs, longer.manifest["sides"]) == (200, source.manifest["sides"])

    assert here(monkeypatch, repack.main, source.prefix, "--seq-length", 20) == 0
    shorter = TokenizedRows(tmp_path / "Tokenized-a-20_text_document")
    fitting_pairs = Counter({sides: n for sides, n in before.items() if sum(len(tokens) // 8 for tokens, _ in sides) <= 20})
    assert pairs_of(shorter) == fitting_pairs
    (dropped,) = shorter.manifest["repacked"]
    assert dropped["dropped"] == {"longer than 20 tokens": 200 - shorter.num_pairs} and dropped["from_pairs"] == 200
    assert f"dropped {200 - shorter.num_pairs} pairs: longer than 20 tokens" in capsys.readouterr().out

    assert here(monkeypatch, repack.main, source.prefix, "--seq-length", 20, "--overlong", "truncate", "--seed", 2) == 0
    cut = TokenizedRows(shorter.prefix)
    assert sorted(check_pairs(cut, 20)) == list(range(200))
    assert here(monkeypatch, repack.main, source.prefix, "--seq-length", 20, "--overlong", "error", "--seed", 4) == 2
    assert "a pair has" in capsys.readouterr().err
    assert here(monkeypatch, repack.main, source.prefix, "--seq-length", 3) == 2
    assert "no pair of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ((6, 4), (6, 4)),
        ((9, 4), (6, 4)),
        ((3, 12), (3, 7)),
        ((9, 9), (5, 5)),
        ((6, 5), (5, 5)),
        ((5, 6), (5, 5)),
        ((11, 1), ()),
    ],
)
def test_a_pair_that_is_cut_leaves_each_side_half_and_what_the_other_does_not_need(
    lengths: tuple[int, int], expected: tuple[int, ...]
) -> None:
    unit = tuple(Conversation(np.arange(n) + side, [1, n - 1] if n > 1 else [1]) for side, n in enumerate(lengths))
    counts = Counts()
    cut = fitting(unit, 10, "truncate", counts)
    assert tuple(len(conversation.tokens) for conversation in cut) == expected
    assert counts.num_truncated + sum(counts.dropped.values()) == (sum(lengths) > 10)


def damaged(prefix: Path, facts: dict[str, Any]) -> None:
    """The files of one pair with some facts of the manifest changed."""
    manifest = json.loads(data_file(prefix, "json").read_text())
    data_file(prefix, "json").write_text(json.dumps(sealed(manifest | facts)))


def test_files_with_half_a_pair_are_not_read(tmp_path: Path) -> None:
    single = [Conversation(np.array([1, 2, 3]), [1, 2]) for _ in range(4)]
    with ConversationStore(tmp_path / "single", token_dtype(100)) as store:
        for conversation in single[:3]:
            store.add(conversation)
        packed = store.pack(6, 1, packing=True)  # two conversations and one
        store.write(packed, {"format": 1} | store.totals(packed, 6))
    for pairs, reason in ((2, "3 conversations and 2 pairs"), (1.5, "1.5 pairs"), ("1", "'1' pairs"), (-1, "-1 pairs")):
        damaged(tmp_path / "single", {"pairs": pairs})
        with pytest.raises(UserError, match=re.escape(reason)):
            TokenizedRows(tmp_path / "single")
    with ConversationStore(tmp_path / "odd", token_dtype(100)) as store:
        for conversation in single:
            store.add(conversation)
        packed = store.pack(9, 1, packing=True)  # three conversations and one
        store.write(packed, {"format": 1} | store.totals(packed, 9))
    damaged(tmp_path / "odd", {"pairs": 2})
    with pytest.raises(UserError, match="a row with half of a preference pair"):
        TokenizedRows(tmp_path / "odd")
    with ConversationStore(tmp_path / "untrained", token_dtype(100)) as store:
        store.add(single[0], Conversation(np.array([1, 2]), [2]))
        packed = store.pack(9, 1, packing=True)
        store.write(packed, {"format": 1} | store.totals(packed, 9))
    with pytest.raises(UserError, match="a side of a preference pair without a trained token"):
        TokenizedRows(tmp_path / "untrained")
