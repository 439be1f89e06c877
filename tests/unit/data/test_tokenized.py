"""The files of tokenised data: what plain megatron-core reads from them, and what our reader refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.sft.chat.encoding import Conversation
from megatron.sft.data.packing import Packing, pack_rows
from megatron.sft.data.store import ConversationStore
from megatron.sft.data.tokenized import TokenizedRows, data_file, token_dtype, write_index
from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import sealed

# Two rows: conversations 2 and 0, then 1. Trained runs are the second, fourth, ... of each.
CONVERSATIONS = [
    Conversation(np.array([10, 11, 12, 13, 14]), [2, 3]),
    Conversation(np.array([20, 21, 22, 23, 24, 25]), [1, 1, 2, 1, 1]),
    Conversation(np.array([49151, 31]), [1, 1]),
]
PACKING = Packing(np.array([2, 0, 1]), np.array([0, 2, 3]), np.zeros(2, dtype=bool))


def manifest_of(rows: int, tokens: int, dtype: str, conversations: int = 3, trained: int = 6) -> dict[str, object]:
    counts = {"rows": rows, "tokens": tokens, "conversations": conversations, "trained_tokens": trained}
    return {"format": 1, **counts, "length": 64, "max_token_id": 49151, "dtype": dtype}


def write(prefix: Path, vocabulary_size: int = 49152) -> Path:
    with ConversationStore(prefix, token_dtype(vocabulary_size)) as store:
        for conversation in CONVERSATIONS:
            store.add(conversation)
        store.write(PACKING, manifest_of(2, 13, store.dtype.name))
    return prefix


def test_rows_come_back_with_their_masks_and_borders(tmp_path: Path) -> None:
    rows = TokenizedRows(write(tmp_path / "data.v1"))
    assert len(rows) == 2
    first, second = rows[0], rows[1]
    assert first.tokens.tolist() == [49151, 31, 10, 11, 12, 13, 14]
    assert first.trained.tolist() == [False, True, False, False, True, True, True]
    assert first.conversation_lengths.tolist() == [2, 5]
    assert second.tokens.tolist() == [20, 21, 22, 23, 24, 25]
    assert second.trained.tolist() == [False, True, False, False, True, False]
    assert second.conversation_lengths.tolist() == [6]
    assert first.tokens.dtype == first.conversation_lengths.dtype == np.int64
    assert first.trained.dtype == np.bool_
    with pytest.raises(IndexError):
        rows[2]


def test_49152_tokens_are_stored_in_two_bytes_and_65500_in_four(tmp_path: Path) -> None:
    write(tmp_path / "small", 49152)
    write(tmp_path / "large", 65500)
    assert (tmp_path / "small.bin").stat().st_size == 2 * 13
    assert (tmp_path / "large.bin").stat().st_size == 4 * 13
    for row, other in zip(TokenizedRows(tmp_path / "small"), TokenizedRows(tmp_path / "large"), strict=True):
        assert row.tokens.tolist() == other.tokens.tolist()
        assert row.trained.tolist() == other.trained.tolist()


def test_megatron_cores_indexed_dataset_reads_pure_token_ids(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = write(tmp_path / "data")
    plain = IndexedDataset(str(prefix))
    assert plain.document_indices.tolist() == [0, 4, 9]
    documents = [np.concatenate([plain[segment] for segment in range(start, end)]).tolist() for start, end in ((0, 4), (4, 9))]
    assert documents == [[49151, 31, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25]]
    with_modes = IndexedDataset(str(prefix), multimodal=True)
    tokens, mode = with_modes[3]
    assert tokens.tolist() == [12, 13, 14]
    assert mode == 1


def test_the_files_are_those_that_megatron_cores_builder_writes(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = write(tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16, multimodal=True)
    builder.add_document(torch.tensor([49151, 31, 10, 11, 12, 13, 14]), [1, 1, 2, 3], [2, 1, 2, 1])
    builder.add_document(torch.tensor([20, 21, 22, 23, 24, 25]), [1, 1, 2, 1, 1], [2, 1, 0, 1, 0])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert data_file(prefix, ending).read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_offsets_beyond_2_gib_do_not_overflow(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import _IndexReader

    path = tmp_path / "data.idx"
    write_index(path, np.dtype(np.int32), np.full(4, 1 << 30), np.arange(5), np.full(4, 2, dtype=np.int8))
    reader = _IndexReader(str(path), multimodal=True)
    assert reader.sequence_pointers.tolist() == [0, 1 << 32, 2 << 32, 3 << 32]


def test_any_packing_gives_back_every_conversation(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    conversations = []
    for _ in range(200):
        runs = random.integers(1, 9, size=int(random.integers(1, 7))).tolist()
        conversations.append(Conversation(random.integers(0, 60000, size=sum(runs)), runs))
    packing = pack_rows(np.array([len(one.tokens) for one in conversations]), 64, seed=1)
    prefix = tmp_path / "data"
    with ConversationStore(prefix, token_dtype(60000)) as store:
        for conversation in conversations:
            store.add(conversation)
        counts = (packing.num_rows, store.num_tokens, "uint16", len(conversations), store.num_trained)
        store.write(packing, manifest_of(*counts))
    found = []
    for row in TokenizedRows(prefix):
        assert len(row.tokens) <= 64
        borders = np.cumsum(row.conversation_lengths)[:-1]
        found += list(zip(np.split(row.tokens, borders), np.split(row.trained, borders), strict=True))
    for index, (tokens, trained) in zip(packing.conversations.tolist(), found, strict=True):
        runs = conversations[index].mask_run_lengths
        assert tokens.tolist() == conversations[index].tokens.tolist()
        assert trained.tolist() == np.repeat(np.arange(len(runs)) % 2 == 1, runs).tolist()
        assert not trained[0]


def fail_to_write(prefix: Path) -> None:
    with ConversationStore(prefix, token_dtype(100)) as store:
        store.add(CONVERSATIONS[0])
        store.write(PACKING, manifest_of(2, 13, "uint16"))  # of conversations that were not added


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        fail_to_write(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_finished_files_stay_when_writing_them_again_fails(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    with pytest.raises(IndexError):
        fail_to_write(prefix)
    assert len(TokenizedRows(prefix)) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_leftovers_of_a_dead_process_are_written_over(tmp_path: Path) -> None:
    for name in ("tokens", "bin", "idx"):
        (tmp_path / f".data.{name}.tmp").write_bytes(b"left over" * 100)
    assert len(TokenizedRows(write(tmp_path / "data"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.json"]


def test_a_second_writer_of_the_same_files_is_refused(tmp_path: Path) -> None:
    with ConversationStore(tmp_path / "data", token_dtype(100)) as store:
        with pytest.raises(UserError, match="is being written by process"):
            ConversationStore(store.prefix, store.dtype).__enter__()
        assert (tmp_path / ".data.tokens.tmp").exists()


def damaged(prefix: Path, damage: str) -> None:
    manifest = json.loads(data_file(prefix, "json").read_text())
    if damage == "no manifest":
        data_file(prefix, "json").unlink()
    elif damage == "no bin":
        data_file(prefix, "bin").unlink()
    elif damage == "short bin":
        data_file(prefix, "bin").write_bytes(b"1234")
    elif damage == "short idx":
        data_file(prefix, "idx").write_bytes(data_file(prefix, "idx").read_bytes()[:40])
    elif damage == "other manifest":
        data_file(prefix, "json").write_text('{"format": 7}')
    elif damage == "other count":
        data_file(prefix, "json").write_text(json.dumps(sealed(manifest | {"rows": 3})))
    elif damage == "not an index":
        content = data_file(prefix, "idx").read_bytes()
        data_file(prefix, "idx").write_bytes(b"X" + content[1:])


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no manifest", "manifest of tokenised data .* is missing"),
        ("no bin", "data.bin is missing"),
        ("short bin", "data.bin has 4 bytes, its manifest says 26"),
        ("short idx", "data.idx has 40 bytes"),
        ("other manifest", "is not a manifest of tokenised data"),
        ("other count", "has rows 2, its manifest 3"),
        ("not an index", "is not an index of tokenised data"),
    ],
)
def test_damaged_files_are_refused_with_the_next_step(tmp_path: Path, damage: str, message: str) -> None:
    prefix = write(tmp_path / "data")
    damaged(prefix, damage)
    with pytest.raises(UserError, match=message) as error:
        TokenizedRows(prefix)
    assert "run scripts/3_tokenize.sh again" in str(error.value)


def test_reading_needs_neither_transformers_nor_torch() -> None:
    import subprocess
    import sys

    code = "import sys, megatron.sft.data.tokenized; print('torch' in sys.modules, 'transformers' in sys.modules)"
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
