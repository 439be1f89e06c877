"""Step 6: answers of a real tiny model, one by one and in batches, and what the command says when something is wrong."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.sft.generate import chat, stream_answer
from megatron.sft.inference.answer_file import answer_file, read_questions
from megatron.sft.inference.backends import Decoding
from megatron.sft.inference.chat_model import Answer, ChatModel, load_chat_model
from megatron.sft.runtime.errors import UserError
from tests.support.taught import PROMPT, TAUGHT, taught_folder, untrained_folder


@pytest.fixture(scope="module")
def taught() -> ChatModel:
    return load_chat_model(taught_folder())


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


def test_chat_survives_an_answer_that_is_stopped_cut_or_impossible(taught, monkeypatch, capsys):
    lines = iter(["stop me", " Ada" * 600, TAUGHT[3][0]])
    backend_generate = taught.backend.generate

    def stopped_once(prompts, decoding, on_token):
        if "stop me" in taught.tokenizer.decode(prompts[0]):
            raise KeyboardInterrupt
        return backend_generate(prompts, decoding, on_token)

    def next_line(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    backend = SimpleNamespace(longest_prompt=taught.backend.longest_prompt, generate=stopped_once)
    chat(ChatModel(taught.tokenizer, backend, taught.stop_ids), "<think>", Decoding(4))
    stopped, too_long, cut = capsys.readouterr().out.splitlines()
    assert "stopped" in stopped and "the model reads at most 512" in too_long
    assert TAUGHT[3][2].startswith(cut.removesuffix(" [cut at MAX_NEW_TOKENS]")) and cut.endswith("MAX_NEW_TOKENS]")


@pytest.mark.parametrize("on_terminal", [True, False])
def test_an_answer_cannot_command_the_terminal(taught, on_terminal, monkeypatch, capsys):
    wanted = "\x1b[2Jgone\r\x9b1Afirst\n\tsecond"
    tokens = taught.tokenizer(wanted, add_special_tokens=False).input_ids

    def generate(prompts, decoding, on_token):
        for token in tokens:
            on_token(token)
        return [tokens]

    monkeypatch.setattr("sys.stdout.isatty", lambda: on_terminal)
    model = ChatModel(taught.tokenizer, SimpleNamespace(longest_prompt=None, generate=generate), taught.stop_ids)
    assert stream_answer(model, user("Hi"), "", Decoding(len(tokens))) == wanted  # the next turn sees it as it is
    shown = "␛[2Jgone␍⟨U+009B⟩1Afirst\n\tsecond" if on_terminal else wanted
    assert capsys.readouterr().out.startswith(shown)


def test_file_that_was_cut_off_continues_where_it_was(tmp_path):
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
    broken = ChatModel(model.tokenizer, SimpleNamespace(longest_prompt=None, generate=cut_off_after_one_batch), model.stop_ids)
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
    [{"query": "a"}, {"prompt": "a"}, {"conversations": [{"from": "human", "value": "a"}]}, {"prompt": "a", "completion": ""}],
)
def test_question_without_an_answer_is_read_in_every_format(tmp_path, row):
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    [question] = read_questions(tmp_path / "data.jsonl", with_reference=False)
    assert (question.messages, question.reference) == (user("a"), None)


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_preference_pair_is_a_question_with_its_chosen_answer(tmp_path, with_reference):
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "b"), ("rejected", "c"))}
    whole = {name: user("a") + turns for name, turns in answers.items()}
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, whole, {"prompt": user("a"), **answers}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(tmp_path / "data.jsonl", with_reference)
    assert [(question.messages, question.reference) for question in questions] == [(user("a"), "b")] * 3
