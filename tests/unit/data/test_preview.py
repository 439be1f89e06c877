"""Looking at tokenised data: the page needs nothing else, shows every text as it is, and marks what is trained."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron.sft import show_sample
from megatron.sft.chat.encoding import Conversation, load_tokenizer
from megatron.sft.data.store import ConversationStore, length_histogram, length_statistics
from megatron.sft.data.tokenized import TokenizedRows, data_prefix, token_dtype
from megatron.sft.runtime.errors import run
from tests.support.material import smollm2_folder

HEADER = '<|im_start|>user\n<script>alert("1")</script> & <b>x</b>\t😀\x1b[8m\x9b\u202e<|im_end|>\n<|im_start|>assistant\n'
SHOWN_HEADER = HEADER.translate({9: "⇥\t", 0x1B: "␛", 0x9B: "⟨U+009B⟩", 0x202E: "⟨U+202E⟩"})
ANSWER = "a < b && c > d ' \" é<|im_end|>"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 conversations of one text, in rows of 256 tokens, with a manifest as tokenising writes it."""
    prefix = tmp_path_factory.mktemp("data") / "data.v1"
    tokenizer = load_tokenizer(smollm2_folder())
    header, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (HEADER, ANSWER))
    with ConversationStore(prefix, token_dtype(len(tokenizer))) as store:
        import numpy as np

        for _ in range(30):
            store.add(Conversation(np.array(header + answer), [len(header), len(answer)]))
        packing = store.pack(256, 1, packing=True)
        source = {"path": "/data/<x>.jsonl", "read": 33, "kept": 30, "truncated": 0, "dropped": {"longer than 256 tokens": 3}}
        facts = {"format": 1, "seed": 1, "sources": [source], "notes": ["a <note>"], "algorithm": "best-fit-decreasing"}
        tokenizer_facts = {"path": str(smollm2_folder()), "name": "SmolLM2"}
        store.write(packing, facts | {"tokenizer": tokenizer_facts} | store.totals(packing, 256))
    return prefix


def show(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        run(lambda: show_sample.main([*map(str, arguments)]))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


class Page(HTMLParser):
    """What a browser would see: tags, attributes, and the text within elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.marked: list[str] = []
        self.in_pre: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)
        if tag == "pre":
            self.in_pre.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.in_pre[-1] += data
            if "mark" in self.open:
                self.marked.append(data)


def test_the_page_shows_rows_with_their_masks_and_the_totals(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "page.html"
    assert show(monkeypatch, f"{prefix}.json", "--html", target, "--rows", 2) == 0
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    rows = TokenizedRows(prefix)
    shown = sum(len(rows[number].conversation_lengths) for number in (0, 1))
    assert page.in_pre == [SHOWN_HEADER + ANSWER] * shown
    assert page.marked == [ANSWER] * shown
    assert "script" not in page.tags and "b" not in page.tags
    assert text.count('<div class="conversation">') == shown
    for number in (rows.manifest["tokens"], rows.manifest["trained_tokens"], rows.manifest["rows"]):
        assert f"{number:,}" in text
    for wanted in ("30", "3 longer than 256 tokens", "/data/<x>.jsonl", "a <note>"):
        assert html.escape(wanted) in text
    assert page.tags.count("i") == len(rows.manifest["conversation_lengths"]["histogram"])


@pytest.mark.parametrize("color", ["", "1"])
def test_a_text_cannot_command_the_terminal(
    prefix: Path, color: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", color)
    assert show(monkeypatch, prefix, 0) == 0
    printed = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out) if color else capsys.readouterr().out
    assert SHOWN_HEADER + (ANSWER if color else f"[[{ANSWER}]]") in printed
    assert all(character.isprintable() or character in "\n\t" for character in printed)


def test_a_system_prompt_that_every_conversation_has_is_shown_once() -> None:
    from megatron.sft.data.preview import _PagePieces

    class Words:
        def decode(self, ids: list[int], **_: object) -> str:
            return "".join(("You are a clerk.\n" * 10, "Question one?\n", "Question two?\n", "Answer.")[id] for id in ids)

    import numpy as np

    pieces = _PagePieces(Words())
    system, mask = "You are a clerk.\n" * 10, np.array([False, False, True])
    assert list(pieces.of(np.array([0, 1, 3]), mask)) == [(f"{system}Question one?\n", "read"), ("Answer.", "trained")]
    again = list(pieces.of(np.array([0, 2, 3]), mask))
    assert again == [(system, "repeated"), ("Question two?\n", "read"), ("Answer.", "trained")]


def test_the_page_loads_nothing_from_elsewhere(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    assert show(monkeypatch, prefix, "--html", target) == 0
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert not {name for name, _ in page.attributes} & {"src", "href", "onload", "onclick"}
    assert not set(page.tags) & {"link", "script", "img", "iframe"}
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_rows_and_files_that_are_not_there_are_named(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, prefix, 99) == 2
    assert "row 99 does not exist" in capsys.readouterr().err
    assert show(monkeypatch, prefix, "--html", "/nowhere/page.html") == 2
    assert "cannot write /nowhere/page.html" in capsys.readouterr().err
    assert show(monkeypatch, prefix, "--tokenizer", "/nowhere") == 2
    assert "tokenizer folder /nowhere" in capsys.readouterr().err


def test_a_prefix_may_have_dots() -> None:
    assert [data_prefix(Path(name)).name for name in ("a.v1", "a.v1.bin", "a.v1.idx", "a.v1.json")] == ["a.v1"] * 4


def test_lengths_are_counted_in_four_steps_a_doubling() -> None:
    import numpy as np

    lengths = np.array([1, 1, 2, 100, 128, 129, 16384])
    histogram = length_histogram(lengths)
    assert [[up_to, count] for up_to, count in histogram if count] == [[1, 2], [2, 1], [108, 1], [128, 1], [152, 1], [16384, 1]]
    assert sum(count for _, count in histogram) == len(lengths)
    assert length_statistics(lengths) == {
        "mean": pytest.approx(16745 / 7),
        "shortest": 1,
        "median": 100,
        "p90": 129,
        "p99": 129,
        "longest": 16384,
    }
    assert json.loads(json.dumps(histogram)) == histogram
