"""Step 6: answers of a real tiny model, one by one and in batches, and what the command says when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.sft.inference.answer_file import answer_file
from megatron.sft.inference.chat_model import Answer, ChatModel, load_chat_model
from megatron.sft.inference.decoding import Decoding
from megatron.sft.inference.questions import read_questions
from megatron.sft.runtime.errors import UserError
from tests.support.taught import PROMPT, TAUGHT, taught_folder, untrained_folder

ROOT = Path(__file__).resolve().parents[3]


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


def test_file_that_was_cut_off_goes_on_where_it_was(tmp_path):
    """The first answers are kept in a hidden file beside the output; one of them is changed, to see that it is used."""
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"prompt": row[0]}) + "\n" for row in TAUGHT))
    settings = {"control": "<short>", "seed": 1}

    class CutOffError(Exception):
        pass

    def cut_off_after_one_batch(*arguments, **options):
        if (tmp_path / ".out.jsonl.unfinished").read_text().count("\n") > 1:
            raise CutOffError
        return backend_generate(*arguments, **options)

    model = load_chat_model(taught_folder())
    backend_generate = type(model.backend).generate.__get__(model.backend)
    broken = ChatModel(
        model.tokenizer, SimpleNamespace(longest_prompt=None, generate=cut_off_after_one_batch), model.stop_ids
    )
    with pytest.raises(CutOffError):
        answer_file(broken, data, output, Decoding(64, batch_size=2), settings)
    assert not output.exists()
    kept = tmp_path / ".out.jsonl.unfinished"
    lines = kept.read_text().splitlines()
    assert len(lines) == 3
    number = json.loads(lines[1])[0]
    kept.write_text("\n".join([lines[0], json.dumps([number, "kept", True]), lines[2], '[3, "cut']))
    answer_file(model, data, output, Decoding(64, batch_size=2), settings)
    answers = [json.loads(line)["answer"] for line in output.read_text().splitlines()]
    assert answers == ["kept" if place == number else row[1] for place, row in enumerate(TAUGHT)]
    assert not kept.exists()
    kept.write_text(lines[0] + "\n" + json.dumps([number, "of other settings", True]) + "\n")
    answer_file(model, data, output, Decoding(64, batch_size=2), {**settings, "seed": 2})
    assert "of other settings" not in output.read_text()


@pytest.mark.parametrize(
    "row",
    [
        {"query": "a"},
        {"prompt": "a"},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"prompt": "a", "completion": ""},
    ],
)
def test_question_without_an_answer_is_read_in_every_format(tmp_path, row):
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    [question] = read_questions(tmp_path / "data.jsonl", with_reference=False)
    assert (question.messages, question.reference) == (user("a"), None)


VLLM = """
import types
import torch
from transformers import AutoModelForCausalLM
class SamplingParams:
    def __init__(self, *, temperature, top_p, top_k, max_tokens, stop_token_ids, seed, detokenize):
        assert top_k == -1 or top_k > 0
        self.max_tokens, self.stop = max_tokens, stop_token_ids
class LLM:
    def __init__(self, model, *, tokenizer, dtype, seed, tensor_parallel_size, trust_remote_code):
        assert tensor_parallel_size == 1 and trust_remote_code is False
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=512))
    def generate(self, prompts, sampling_params, *, use_tqdm):
        return [self.one(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]
    def one(self, ids, sampling):
        out = self.model.generate(torch.tensor([ids]), max_new_tokens=sampling.max_tokens, eos_token_id=sampling.stop)
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(out[0, len(ids):].tolist()))])
"""


def test_vllm_gets_token_ids_and_the_models_stop_tokens(tmp_path):
    """vLLM needs a GPU: a module in its place takes the arguments that its documentation names, and a real model answers."""
    (tmp_path / "vllm.py").write_text(VLLM)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": row[0]}) + "\n" for row in TAUGHT))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    line = [sys.executable, "-m", "megatron.sft.generate", str(taught_folder()), str(data)]
    line += ["--control", "<think>", "--backend", "vllm"]
    subprocess.run(line, env=environment, check=True, timeout=120, capture_output=True)
    rows = [json.loads(text) for text in (tmp_path / "data.answers.jsonl").read_text().splitlines()]
    assert [(row["answer"], row["finished"]) for row in rows] == [(row[2], True) for row in TAUGHT]
