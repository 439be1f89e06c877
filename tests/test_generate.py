"""Step 6: answers of a real tiny model, one by one and in batches, and what the command says when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.sft.answers import Answer, ChatModel, Decoding, load_chat_model
from megatron.sft.errors import UserError
from megatron.sft.questions import read_questions
from tests.taught import PROMPT, TAUGHT, taught_folder, untrained_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def taught() -> ChatModel:
    return load_chat_model(taught_folder())


def generate(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "megatron.sft.generate", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, input=text)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("mode", [1, 2])
def test_control_token_forces_the_mode(taught, mode):
    control = ("", "<short>", "<think>")[mode]
    answers = taught.answers([user(row[0]) for row in TAUGHT], control, Decoding(64))
    assert answers == [Answer(row[mode], True) for row in TAUGHT]


def test_batched_answers_are_those_that_transformers_gives_one_by_one():
    tokenizer = AutoTokenizer.from_pretrained(untrained_folder())
    model = AutoModelForCausalLM.from_pretrained(untrained_folder())
    questions = ["Sort these names: Ada", "Hi", "Sort these names: Zoe Tom Ben Ada Kim", "What is 2 + 2, please?"]
    expected = []
    for question in questions:
        ids = torch.tensor([tokenizer(PROMPT.format(question)).input_ids])
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=False).split("<|im_end|>")[0])
    answers = load_chat_model(untrained_folder()).answers(list(map(user, questions)), "", Decoding(12, batch_size=3))
    assert [answer.text for answer in answers] == expected


def test_answer_that_the_limit_cut_is_marked(taught):
    [answer] = taught.answers([user(TAUGHT[0][0])], "<think>", Decoding(3))
    assert answer == Answer("<think> Tom. Add", False)


def test_same_seed_samples_the_same_and_temperature_matters(taught):
    def sample(seed: int, temperature: float) -> list[Answer]:
        torch.manual_seed(seed)
        return taught.answers([user("Sort these names: Una Val Ben")] * 4, "", Decoding(16, temperature))

    assert sample(1, 3.0) == sample(1, 3.0)
    assert sample(1, 3.0) != sample(2, 3.0)
    assert sample(1, 0.0) == sample(2, 0.0)


def test_mistyped_control_token_is_refused(taught):
    with pytest.raises(UserError, match=r"control token '<shrt>' .* it has <short> <think> </think>"):
        taught.answers([user("Hi")], "<shrt>", Decoding())


def test_prompt_longer_than_the_model_reads_is_refused(taught):
    with pytest.raises(UserError, match=r"a prompt has 60\d tokens, the model reads at most 512"):
        taught.answers([user(" Ada" * 600)], "", Decoding())


def test_rows_with_and_without_answers_are_read(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"instruction": "a"}\n{"instruction": "a", "output": "b"}\n'
        '{"messages": [{"role": "user", "content": "a"}]}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    questions = read_questions(data, with_reference=False)
    assert [question.messages for question in questions] == [user("a")] * 4
    assert [question.reference for question in questions] == [None, "b", None, "b"]
    with pytest.raises(UserError, match="line 1: field 'output' is missing"):
        read_questions(data, with_reference=True)


def test_prompt_is_answered_on_standard_output():
    done = generate(taught_folder(), TAUGHT[3][0], "--control", "<think>")
    assert (done.returncode, done.stdout) == (0, TAUGHT[3][2] + "\n"), done.stderr


def test_file_is_answered_beside_it(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"instruction": row[0], "id": place}) + "\n" for place, row in enumerate(TAUGHT))
    )
    done = generate(taught_folder(), data, "--control", "<short>", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "data.answers.jsonl").read_text().splitlines()]
    expected = [
        {"instruction": row[0], "id": place, "answer": row[1], "finished": True} for place, row in enumerate(TAUGHT)
    ]
    assert rows == expected


def test_chat_switches_the_mode_and_starts_again():
    lines = [TAUGHT[0][0], "/new", "/control <think>", TAUGHT[1][0], "/control <thnk>", "/quit", "never asked"]
    done = generate(taught_folder(), "--control", "<short>", text="\n".join(lines))
    assert done.returncode == 0, done.stderr
    refusal = "control token '<thnk>' is not in the model's vocabulary: it has <short> <think> </think>"
    assert done.stdout.splitlines() == [TAUGHT[0][1], TAUGHT[1][2], refusal]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "Hi"], "error: model folder nowhere does not exist"),
        ([ROOT / "tests", "Hi"], "has no config.json"),
        ([untrained_folder, "nowhere.jsonl"], "error: data file nowhere.jsonl does not exist"),
        ([untrained_folder, "Hi", "--backend", "vllm"], "error: BACKEND=vllm needs the package vllm"),
        ([untrained_folder, "Hi", "--max-new-tokens", "0"], "error: MAX_NEW_TOKENS=0 is too small"),
    ],
)
def test_mistake_gets_one_line(arguments, message):
    done = generate(*[part() if callable(part) else part for part in arguments])
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
