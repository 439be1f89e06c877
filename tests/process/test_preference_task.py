"""A task whole: a tiny model that was taught to think before it answers learns from pairs to answer at once."""

import json
from pathlib import Path

import pytest
import torch

from megatron.sft.quickstart import END_THINK, SHORT, THINK, Question, make_model_folder, make_questions
from tests.support import tiny

# Questions that it is taught with, pairs, and questions that it is asked.
NUM_TAUGHT, NUM_PAIRS, NUM_ASKED = 1200, 400, 120
TEACHING = ["--lr", "3e-3", "--min-lr", "3e-4", "--train-iters", "150", "--adam-beta2", "0.99", "--weight-decay", "0.01"]
PREFERRING = ["--objective", "dpo", "--lr", "1e-4", "--min-lr", "1e-5", "--train-iters", "40", "--dpo-beta", "0.1"]
COMMON = ["--precision", "fp32", "--global-batch-size", "8", "--micro-batch-size", "8", "--log-interval", "10"]


def _answers(question: Question) -> tuple[str, str]:
    return f"{SHORT} {question.answer}", f"{THINK} {question.work} {END_THINK} {question.answer}"


def _write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _trained(work: Path, name: str, model: Path, records: Path, words: list[str]) -> Path:
    """From a Hugging Face folder and records to the Hugging Face folder of the trained model, by the commands."""
    paths = {kind: work / f"{name} {kind}" for kind in ("ckpt", "data", "run", "hf")}
    tiny.run_module("convert", "--hf-dir", model, "--output", paths["ckpt"])
    data = ["--tokenizer", model, "--input", records, "--seq-length", 256, "--output-prefix", paths["data"]]
    tiny.run_module("tokenize", *data)
    inputs = ["--load", paths["ckpt"], "--data-path", paths["data"], "--save", paths["run"]]
    tiny.launch(1, "train", "train", *inputs, *COMMON, *words)
    tiny.run_module("export", "--load", paths["run"], "--hf-dir", model, "--output", paths["hf"])
    return paths["hf"]


def _starts(folder: Path, questions: list[Question]) -> list[str]:
    """The first tokens of each answer, greedily, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for question in questions:
        turns = [{"role": "user", "content": question.text}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        found.append(tokenizer.decode(answer))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_learns_from_pairs_to_prefer_the_short_answer(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "model")
    training, held_out = make_questions(seed=7)
    taught = []
    for index, question in enumerate(training[:NUM_TAUGHT]):
        short, long = _answers(question)
        # One in ten is answered at once, so that the model knows how.
        taught.append({"instruction": question.text, "output": short if index % 10 == 0 else long})
    before = _trained(tmp_path, "sft", tmp_path / "model", _write(tmp_path / "taught.jsonl", taught), TEACHING)
    pairs = []
    for question in training[NUM_TAUGHT : NUM_TAUGHT + NUM_PAIRS]:
        short, long = _answers(question)
        pairs.append({"prompt": question.text, "chosen": short, "rejected": long})
    after = _trained(tmp_path, "dpo", before, _write(tmp_path / "pairs.jsonl", pairs), PREFERRING)

    shares = {}
    for name, folder in (("before", before), ("after", after)):
        starts = _starts(folder, held_out[:NUM_ASKED])
        shares[name] = sum(start.startswith(SHORT) for start in starts) / NUM_ASKED
    steps = [line for line in tiny.metrics(tmp_path / "dpo run") if "lr" in line]
    assert shares["before"] <= 0.05 and shares["after"] >= 0.95, shares
    assert steps[-1]["rewards/accuracies"] >= 0.95
    card = (after / "README.md").read_text()
    assert "Direct preference optimization of" in card and "- objective: dpo, DPO_LOSS=sigmoid, DPO_BETA=0.1" in card
    assert f"- pairs: {NUM_PAIRS}" in card and "- reference: `dpo ckpt`" in card
