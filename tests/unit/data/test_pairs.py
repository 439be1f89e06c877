"""Preference pairs from records to rows: the same prompt, masks as TRL and transformers see them, what is refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron.sft import show_sample, tokenize
from megatron.sft.chat.encoding import load_tokenizer
from megatron.sft.data.tokenized import Row, TokenizedRows, data_file
from megatron.sft.runtime.errors import run
from tests.support.material import npm_tokenizer, smollm2_folder

Record = dict[str, Any]
TOOL = {"type": "function", "function": {"name": "tide", "description": "Tides", "parameters": {"type": "object"}}}


def turn(role: str, content: Any, **more: Any) -> Record:
    return {"role": role, "content": content, **more}


def pair(index: int, words: int = 3) -> Record:
    return {"prompt": f"Question {index}?", "chosen": "yes " * words + f"{index}", "rejected": "no " * words + f"{index}"}


def here(monkeypatch: pytest.MonkeyPatch, main: Any, *arguments: object) -> int:
    """A command in this process; its exit status."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        run(lambda: main([*map(str, arguments)]))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


class Step:
    """Step 3 in this process, with its result next to the data."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.prefix = folder / "out"
        self.tokenizer = smollm2_folder()

    def __call__(self, records: list[Record], *options: object, length: int = 256, name: str = "data.jsonl") -> int:
        (self.folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        self.capsys.readouterr()
        arguments = ["--tokenizer", self.tokenizer, "--input", self.folder / name, "--seq-length", length, "--num-workers", 1]
        return here(self.monkeypatch, tokenize.main, *arguments, "--output-prefix", self.prefix, *options)

    def refusal(self, records: list[Record], *options: object, length: int = 256) -> str:
        assert self(records, *options, length=length) == 2
        (line,) = self.capsys.readouterr().err.splitlines()
        assert not data_file(self.prefix, "json").exists()
        return line.removeprefix("error: ")

    @property
    def rows(self) -> TokenizedRows:
        return TokenizedRows(self.prefix)


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Step:
    return Step(tmp_path, monkeypatch, capsys)


def conversations(row: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(row.tokens[start:stop], row.trained[start:stop]) for start, stop in row.spans.tolist()]


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "Brest"}}}
MESSAGES: dict[str, Record] = {
    "one question": {
        "prompt": [turn("user", "2+2?")],
        "chosen": [turn("assistant", "4")],
        "rejected": [turn("assistant", "It is five, I think.")],
    },
    "several rounds and a system text": {
        "prompt": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "2+2?")],
        "chosen": [turn("assistant", "4")],
        "rejected": [turn("assistant", "5")],
    },
    "reasoning": {
        "prompt": [turn("user", "2+2?")],
        "chosen": [turn("assistant", "<think>\nAdd.\n</think>\n\n4")],
        "rejected": [turn("assistant", "<think>\nGuess.\n</think>\n\n5")],
    },
    "functions": {
        "prompt": [turn("user", "When is the tide?")],
        "chosen": [turn("assistant", "", tool_calls=[CALL])],
        "rejected": [turn("assistant", "At noon.")],
        "tools": [TOOL],
    },
}  # fmt: skip


def trl_ids(tokenizer: Any, record: Record) -> dict[str, list[int]]:
    """What TRL's DPOTrainer makes of a record."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    record = record | ({"tools": json.dumps(record["tools"])} if "tools" in record else {})
    trainer, arguments = SimpleNamespace(_tokenizer=tokenizer), SimpleNamespace(dataset_num_proc=None, max_length=None)
    (ids,) = trl.DPOTrainer._prepare_dataset(trainer, Dataset.from_list([record]), tokenizer, arguments, "train")
    return {name: ids[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("name", ["qwen3", "SmolLM2"])
def test_tokens_and_masks_are_those_of_transformers_and_of_trl(step: Step, name: str) -> None:
    step.tokenizer = smollm2_folder() if name == "SmolLM2" else npm_tokenizer(name)
    tokenizer = load_tokenizer(step.tokenizer)
    explicit = [record for kind, record in MESSAGES.items() if name != "SmolLM2" or kind != "functions"]  # which it has not
    implicit, expected = [], []
    for record in explicit:
        tools = {"tools": record["tools"]} if "tools" in record else {}
        whole = {side: record["prompt"] + record[side] for side in ("chosen", "rejected")}
        implicit.append(whole | tools)
        prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False, **tools)
        sides = [tokenizer.apply_chat_template(messages, return_dict=False, **tools) for messages in whole.values()]
        theirs = trl_ids(tokenizer, record)
        assert theirs["prompt"] == prompt
        assert [prompt + theirs["chosen"], prompt + theirs["rejected"]] == sides
        for ids in sides:
            assert ids[: len(prompt)] == prompt
            end = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
            expected.append((ids, [len(prompt) <= place <= end for place in range(len(ids))]))
    for records in (explicit, implicit):
        assert step(records, "--empty-think", "template", length=600) == 0
        found = [(tokens.tolist(), trained.tolist()) for row in step.rows for tokens, trained in conversations(row)]
        assert sorted(zip(found[::2], found[1::2], strict=True)) == sorted(zip(expected[::2], expected[1::2], strict=True))


def test_earlier_answers_are_context_whatever_the_template_does_with_them(step: Step) -> None:
    """Reasoning of an earlier answer, which Qwen3's template drops, and its empty <think> blocks in all answers."""
    step.tokenizer = npm_tokenizer("qwen3")
    tokenizer = load_tokenizer(step.tokenizer)
    shared = [turn("user", "1+1?"), turn("assistant", "2", reasoning_content="Add."), turn("user", "2+2?")]
    shared += [turn("assistant", "4"), turn("user", "3+3?")]
    assert step([{side: [*shared, turn("assistant", text)] for side, text in (("chosen", "6"), ("rejected", "7"))}]) == 0
    (row,) = step.rows
    empty = "<think>\n\n</think>\n\n"
    prompt = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\nAdd.\n</think>\n\n2<|im_end|>\n"
    prompt += f"<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{empty}4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n"
    for (tokens, trained), text in zip(conversations(row), ("6", "7"), strict=True):
        assert tokenizer.decode(tokens[~trained]) == prompt + "<|im_start|>assistant\n\n"
        assert tokenizer.decode(tokens[trained]) == f"{empty}{text}<|im_end|>"


def test_the_report_and_the_manifest_count_pairs(step: Step) -> None:
    records = [pair(index, words=1 + index % 20) | {"score_chosen": 1.0} for index in range(40)] + [pair(99, words=300)]
    for index, (score, other) in enumerate([("score_rejected", 1.5), ("score_rejected", 1), ("score_rejected", None)]):
        records[index][score] = other
    records[3] |= {"chosen_rating": 2, "rejected_rating": 4.0}
    assert step(records, "--group-key", "prompt", length=128) == 0
    output = step.capsys.readouterr().out.splitlines()
    manifest = step.rows.manifest
    (source,) = manifest["sources"]
    assert (source["read"], source["kept"], source["dropped"]) == (41, 40, {"longer than 128 tokens": 1})
    assert source["format"] == "prompt/chosen/rejected"
    assert (manifest["pairs"], manifest["conversations"], manifest["read_lengths"]["pairs"]) == (40, 80, 41)
    assert manifest["read_lengths"]["longest"] > 600 and manifest["pair_lengths"]["longest"] <= 128
    lengths = [row.conversation_lengths.reshape(-1, 2).sum(1) for row in step.rows]
    assert manifest["pair_lengths"]["mean"] == pytest.approx(np.concatenate(lengths).mean())
    chosen, rejected = manifest["sides"]["chosen"], manifest["sides"]["rejected"]
    of_chosen = f"chosen: {chosen['tokens']:,} tokens, {chosen['trained_tokens']:,} of them trained"
    assert f"{of_chosen}; {chosen['tokens'] / 40:,.1f} tokens on average" in output
    assert rejected["tokens"] == manifest["tokens"] - chosen["tokens"]
    assert any(line.startswith(f"packed 40 pairs into {manifest['rows']} rows") for line in output)
    assert "dropped 1 pairs: longer than 128 tokens" in output
    assert "note: 2 pairs score their chosen answer below the rejected one: are the sides exchanged?" in output
    assert any(line.startswith("lengths of pairs, both sides together: min ") for line in output)
    assert output[-1].startswith("next: bash tools/new_recipe data_")
    sample = output[: output.index("---- read 41 records of " + str(step.folder / "data.jsonl") + " (json lines) ----")]
    assert [line for line in sample if line.startswith("[[")][:2] == ["[[yes 0<|im_end|>]]", "[[no 0<|im_end|>]]"]
    assert (
        sum(line.startswith("-- prompt: ") for line in sample) == sum(line.startswith("-- rejected: ") for line in sample) == 2
    )


def test_both_answers_are_shown_below_their_prompt(step: Step) -> None:
    assert step([pair(1), pair(2)]) == 0
    step.capsys.readouterr()
    assert here(step.monkeypatch, show_sample.main, step.prefix) == 0
    shown = step.capsys.readouterr().out
    assert shown.count("Question 1?") == 1 and shown.count("Question 2?") == 1
    assert re.findall(r"---- (pair \d of 2, prompt|chosen|rejected): ", shown) == [
        *("pair 1 of 2, prompt", "chosen", "rejected", "pair 2 of 2, prompt", "chosen", "rejected")
    ]
    assert all(f"[[{text} {number}<|im_end|>]]" in shown for text in ("yes yes yes", "no no no") for number in (1, 2))
    target = step.folder / "page.html"
    assert here(step.monkeypatch, show_sample.main, step.prefix, "--html", target) == 0
    page = target.read_text(encoding="utf-8")
    pairs = page.split('<div class="pair">')[1:]
    assert len(pairs) == 2 and page.count('<div class="sides">') == 2
    for text in pairs:
        prompt, sides = text.split('<div class="sides">')
        assert "Question" in prompt and "<mark>" not in prompt and "Question" not in sides
        assert [mark.split(" ")[0] for mark in re.findall(r"<mark>([^<]*)", sides)] == ["yes", "no"]
    assert "<dt>pairs</dt><dd>2</dd>" in page and "boundary\nbetween two pairs" in page


def test_only_the_last_answer_of_each_side_is_trained_where_that_is_asked_for(step: Step) -> None:
    later = [turn("user", "More?"), turn("assistant", "That is all.")]
    record = {"prompt": "Q", "chosen": [turn("assistant", "A"), *later], "rejected": [turn("assistant", "B"), *later]}
    assert step([record], "--train-on", "last_assistant") == 0
    tokenizer = load_tokenizer(step.tokenizer)
    (row,) = step.rows
    assert [tokenizer.decode(tokens[trained]) for tokens, trained in conversations(row)] == ["That is all.<|im_end|>"] * 2


def test_the_prompt_is_checked_up_to_the_first_answer_where_only_the_last_is_trained(step: Step) -> None:
    step.tokenizer = npm_tokenizer("qwen3")
    later = [turn("user", "More?"), turn("assistant", "That is all.")]
    record = {"prompt": "Q", "chosen": [turn("assistant", "\nA"), *later], "rejected": [turn("assistant", "B"), *later]}
    message = step.refusal([record], "--train-on", "last_assistant", "--chat-template", "chatml")
    assert "other tokens before the chosen answer" in message


CONVERSATION = {"messages": [turn("user", "Q"), turn("assistant", "A")]}
SMOLLM2_CASES: dict[str, tuple[list[Record], list[object], str]] = {
    "pairs, then a conversation": ([pair(1), CONVERSATION], [], r"line 2 is a conversation, and .*line 1 a preference pair"),
    "conversations, then a pair": (
        [CONVERSATION, CONVERSATION, pair(1)],
        [],
        r"line 3 is a preference pair, and .*line 1 a conv",
    ),
    "a text among pairs": ([pair(1), {"text": "Once."}], [], r"line 2 is a conversation"),
    "both kinds, whatever becomes of bad records": ([CONVERSATION, pair(1)], ["--bad-rows", "skip"], "is a preference pair"),
    "OVERLONG=split": ([pair(1)], ["--overlong", "split"], r"OVERLONG=split, but .*line 1 is a preference pair"),
    "OVERLONG=split, whatever becomes of bad records": (
        [pair(1)],
        ["--overlong", "split", "--bad-rows", "skip"],
        "OVERLONG=split",
    ),
    "TRAIN_ON=all": ([pair(1)], ["--train-on", "all"], r"TRAIN_ON=all, but .*line 1 is a preference pair"),
    "a pair that is too long": (
        [pair(1, 300)],
        ["--overlong", "error"],
        r"line 1: the two conversations of the pair.* LENGTH 256",
    ),
    "only pairs that are too long": ([pair(1, 300)], [], "no pair of .* is left"),
    "a side without a trained turn": (
        [{"prompt": "Q", "chosen": [turn("assistant", "A", loss=0)], "rejected": "B"}],
        [],
        "no pair of .* is left",
    ),
    "a record with half a pair": ([pair(1), {"prompt": "Q", "chosen": "A"}], [], "line 2: field 'rejected' is missing"),
    "a third kind of JSON": ([pair(1), {"prompt": "Q", "chosen": {"score": 1}, "rejected": "B"}], [], "line 2: field 'chosen"),
}


@pytest.mark.parametrize("case", SMOLLM2_CASES)
def test_data_that_has_no_pairs_to_train_is_refused(step: Step, case: str) -> None:
    records, options, reason = SMOLLM2_CASES[case]
    assert re.search(reason, step.refusal(records, *options))


def test_a_prompt_whose_last_token_depends_on_the_answer_is_refused(step: Step) -> None:
    step.tokenizer = npm_tokenizer("qwen3")  # joins two line breaks, of which one is the header's
    message = step.refusal([pair(1), pair(2) | {"chosen": "\nyes"}], "--chat-template", "chatml")
    assert re.search(r"line 2: the prompt has other tokens before the chosen answer \(\d+\) than before the rejected", message)


def test_sides_that_become_the_same_tokens_are_refused(step: Step) -> None:
    step.tokenizer = npm_tokenizer("qwen3")  # its template strips line breaks
    message = step.refusal([pair(1) | {"chosen": "\nyes", "rejected": "yes"}])
    assert "line 1: the chosen and the rejected side become the same tokens" in message


def test_bad_pairs_are_set_aside_with_their_reasons(step: Step) -> None:
    step.tokenizer = npm_tokenizer("qwen3")
    bad = [
        pair(2) | {"rejected": ""},
        pair(3) | {"rejected": pair(3)["chosen"]},
        pair(4) | {"chosen": "\nyes", "rejected": "yes"},
        {"chosen": [turn("user", "a"), turn("assistant", "b")], "rejected": [turn("user", "c"), turn("assistant", "d")]},
        pair(5) | {"persona": "P"},
    ]
    assert step([pair(0), *bad, pair(1), pair(6, words=300)], "--bad-rows", "skip") == 0
    lines = [json.loads(line) for line in (step.folder / "data.rejected.jsonl").read_text().splitlines()]
    reasons = {line["line"]: line["reason"] for line in lines}
    expected = {2: "is empty", 3: "are equal", 4: "the same tokens", 5: "differ from turn 0", 6: "'persona'"}
    assert reasons.keys() == expected.keys() and all(expected[line] in reasons[line] for line in reasons)
    (source,) = step.rows.manifest["sources"]
    assert (source["read"], source["kept"]) == (8, 2)
    assert source["dropped"] == {"bad row": 5, "longer than 256 tokens": 1}
