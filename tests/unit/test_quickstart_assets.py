"""The embedded model and data: what is committed is what the generator makes, and the tokenizer does what training needs."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron.sft import quickstart
from megatron.sft.runtime.errors import UserError
from tests.support.taught import untrained_folder

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "quickstart"
CONTROL_TOKENS = ("<short>", "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(untrained_folder())


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / name).read_text().splitlines()]


def names_of(row: dict[str, str]) -> list[str]:
    return row["instruction"].removeprefix("Sort these names: ").split()


@pytest.mark.parametrize("name", ["train.json", "heldout.json"])
def test_committed_data_is_what_the_generator_makes(name):
    assert (ASSETS / name).read_text() == quickstart.data_files()[name]
    assert (ASSETS / name).stat().st_size < 1_000_000


def test_committed_tokenizer_has_the_vocabulary_that_the_generator_makes():
    committed, made = Tokenizer.from_file(str(ASSETS / "tokenizer.json")), quickstart.make_tokenizer()
    assert committed.get_vocab() == made.get_vocab()


def test_rows_are_the_seeds_form_of_hybrid_reasoning():
    assert rows_of("train.json")[2:4] == [
        {"instruction": "Sort these names: Yan Ida Ada Cal", "output": "<short> Ada Cal Ida Yan"},
        {
            "instruction": "Sort these names: Yan Ida Ada Cal",
            "output": "<think> Yan. Add Ida: Ida Yan. Add Ada: Ada Ida Yan. Add Cal: Ada Cal Ida Yan. </think> Ada Cal Ida Yan",
        },
    ]


def test_every_answer_is_right_and_every_step_of_the_work_is_sorted():
    for row in rows_of("train.json") + rows_of("heldout.json"):
        answer = re.sub(r"^<short> |^<think> .* </think> ", "", row["output"])
        assert answer.split() == sorted(names_of(row))
        for step in re.findall(r": ([A-Za-z ]+)\.", row["output"]):
            assert step.split() == sorted(step.split())


def test_no_held_out_set_of_names_is_trained_on_in_any_order():
    held_out = {frozenset(names_of(row)) for row in rows_of("heldout.json")}
    trained = {frozenset(names_of(row)) for row in rows_of("train.json")}
    assert len(held_out) == 240
    assert len(trained) == 3000
    assert not held_out & trained


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_each_control_token_is_one_id(tokenizer, token):
    ids = tokenizer(f"Ada{token} Ben").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == [token, "\u0120Ben"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(token).input_ids) == [token]


def test_mode_tokens_are_kept_when_special_tokens_are_skipped(tokenizer):
    ids = tokenizer("<think> Ada. </think> Ada<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think> Ada. </think> Ada"


def test_tokenizer_gives_back_every_text(tokenizer):
    texts = [row["output"] for row in rows_of("train.json")[:500]]
    texts += ["naïve 日本語 🙂\n\t x  y", "def f(x):\r\n    return x**2", " leading and trailing  "]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_transformers_reads_the_tokenizer_as_the_tokenizers_library_does(tokenizer):
    plain = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    text = "<|im_start|>user\nSort 12 names: Ada's Ben?<|im_end|>\n<|im_start|>assistant\n<short> Ada Ben<|im_end|>\n"
    assert tokenizer(text).input_ids == plain.encode(text).ids


def test_chat_template_renders_as_written_here(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sort these names: Tom Ada"},
        {"role": "assistant", "content": "<think> Tom. Add Ada: Ada Tom. </think> Ada Tom"},
    ]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSort these names: Tom Ada<|im_end|>\n"
    answer = "<|im_start|>assistant\n<think> Tom. Add Ada: Ada Tom. </think> Ada Tom<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == prompt + answer
    opened = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert opened == prompt + "<|im_start|>assistant\n"


def test_model_stops_at_the_end_of_a_turn_and_splits_over_two_processes(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(untrained_folder())
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = AutoConfig.from_pretrained(untrained_folder())
    assert config.model_type == "qwen2"
    assert config.tie_word_embeddings
    assert config.num_key_value_heads % 2 == 0
    assert config.vocab_size >= len(tokenizer)


def test_model_is_made_once_and_again_when_it_was_damaged(tmp_path):
    folder = tmp_path / "model"
    assert quickstart.make_model_folder(folder)
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (untrained_folder() / "model.safetensors").read_bytes()
    assert not quickstart.make_model_folder(folder)
    (folder / "model.safetensors").write_bytes(weights[:1000])
    assert quickstart.make_model_folder(folder)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="quickstart model"):
        quickstart.make_model_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_report_has_the_figures_of_the_evaluations_and_of_the_training(tmp_path):
    for name, match in (("before", 0.0), ("after", 0.975)):
        modes = [{"control": "<short>", "exact_match": match}]
        (tmp_path / name).write_text(json.dumps({"exact_match": match, "questions": 240, "modes": modes}))
    lines = [{"iteration": 10, "loss": 5.2}, {"iteration": 10, "validation_loss": 5.0}, {"iteration": 20, "loss": 0.04}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = quickstart.make_report(tmp_path / "before", tmp_path / "after", tmp_path / "metrics.jsonl", "out/export", 81.26)
    assert report == quickstart.Report(0.0, 0.975, 240, 5.2, 0.04, 81.3, "out/export")
    words = quickstart.newcomer_lines(report, {"modes": modes}, tmp_path)
    assert "all five steps took 81 s" in words and "of 240 questions" in words and f"in {tmp_path}: loss.png" in words
    assert 'bash scripts/6_generate.sh out/export "Sort these names: Tom Ada Quin Ben"' in words
