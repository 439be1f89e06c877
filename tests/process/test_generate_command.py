"""`generate` as users start it: a prompt, a file, a chat, vLLM."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fork_server import SERVER
from tests.support.taught import TAUGHT, taught_folder, untrained_folder

ROOT = Path(__file__).resolve().parents[2]


def generate(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    line = [SERVER.python()["MEGATRON_SFT_PYTHON"], "-m", "megatron.sft.generate", *map(str, arguments)]
    environment = os.environ | SERVER.python()
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, input=text)


def test_prompt_is_answered_on_standard_output():
    done = generate(taught_folder(), TAUGHT[3][0], "--control", "<think>")
    assert (done.returncode, done.stdout) == (0, TAUGHT[3][2] + "\n"), done.stderr


def test_file_is_answered_next_to_it(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": row[0], "id": place}) + "\n" for place, row in enumerate(TAUGHT)))
    done = generate(taught_folder(), data, "--control", "<short>", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "data.answers.jsonl").read_text().splitlines()]
    expected = [{"instruction": row[0], "id": place, "answer": row[1], "finished": True} for place, row in enumerate(TAUGHT)]
    assert rows == expected


def test_chat_switches_the_mode_and_starts_again():
    lines = [TAUGHT[0][0], "/new", "/control <think>", TAUGHT[1][0], "/control <thnk>", "/quit", "never asked"]
    done = generate(taught_folder(), "--control", "<short>", text="\n".join(lines))
    assert done.returncode == 0, done.stderr
    refusal = "control token '<thnk>' is not in the model's vocabulary: it has <short> <think> </think>"
    assert done.stdout.splitlines() == [TAUGHT[0][1], TAUGHT[1][2], refusal]


# Puts the system prompt before the first question, so that together they are a question that was taught.
SYSTEM_FIRST = """{%- set first = messages[0]['content'] ~ ' ' if messages[0]['role'] == 'system' else '' -%}
{%- for m in messages if m['role'] != 'system' -%}
{{ '<|im_start|>' ~ m['role'] ~ '\\n' ~ (first if loop.first else '') ~ m['content'] ~ '<|im_end|>\\n' }}
{%- endfor -%}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"""


def test_a_system_prompt_is_given_to_a_prompt_a_chat_and_a_file(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(taught_folder(), folder)
    (folder / "chat_template.jinja").write_text(SYSTEM_FIRST)
    system, (names, short, _) = "Sort these names:", TAUGHT[0]
    question = names.removeprefix(f"{system} ")
    given = ("--system", system, "--control", "<short>")
    assert generate(folder, question, *given).stdout == short + "\n"
    lines = [question, "/hlep", "/system", names, f"/system {system}", question, "/quit"]
    said = generate(folder, *given, text="\n".join(lines)).stdout.splitlines()
    assert said[:2] == [short, "/hlep is not a command:"] and said[-2:] == [short, short]
    data = tmp_path / "data.jsonl"
    own = [{"role": "system", "content": "Sort these"}, {"role": "user", "content": f"names: {question}"}]
    data.write_text(json.dumps({"instruction": question}) + "\n" + json.dumps({"messages": own}) + "\n")
    assert generate(folder, data, *given).returncode == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "data.answers.jsonl").read_text().splitlines()]
    assert answers == [short, short]


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
