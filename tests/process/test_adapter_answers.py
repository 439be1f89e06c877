"""6_generate and 7_evaluate take a PEFT adapter's folder as they take a model's."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import peft_oracle, tiny
from tests.support.fork_server import SERVER
from tests.support.taught import PROMPT, TAUGHT, taught_folder


def script(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **SERVER.python(), "MEGATRON_SFT_DEVICE": "cpu", **variables}
    command = ["bash", str(tiny.ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and so strong that the answers change."""
    folder = tmp_path_factory.mktemp("adapter")
    return peft_oracle.save_adapter(taught_folder(), folder, target_modules="all-linear", lora_alpha=128)


def peft_answer(adapter: Path, question: str) -> str:
    """The greedy answer of PEFT's own model, its special tokens apart from the end."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model: Any = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(taught_folder())
    prompt = tokenizer(PROMPT.format(question) + "<short>", return_tensors="pt").input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    new = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=end)[0, prompt.shape[1] :]
    text: str = tokenizer.decode([token for token in new.tolist() if token != end], clean_up_tokenization_spaces=False)
    return "<short>" + text


def test_an_adapter_answers_as_in_peft_and_otherwise_than_its_base(adapter: Path) -> None:
    question = TAUGHT[2][0]
    done = script("6_generate.sh", adapter, question, CONTROL="<short>", MAX_NEW_TOKENS="12")
    assert done.returncode == 0, done.stderr
    answer = done.stdout.rstrip("\n").removesuffix(" [cut at MAX_NEW_TOKENS]")
    assert answer == peft_answer(adapter, question) != TAUGHT[2][1]


def test_an_adapter_is_evaluated_and_differs_from_its_base(adapter: Path, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"instruction": q, "output": s.removeprefix("<short> ")}) + "\n" for q, s, _ in TAUGHT))
    results = {"OUTPUT": str(tmp_path / "result.json"), "CONTROL": "<short>", "MAX_NEW_TOKENS": "12"}
    base = script("7_evaluate.sh", taught_folder(), data, **results)
    assert base.returncode == 0 and "exact match 100.0 %" in base.stdout, base.stdout + base.stderr
    done = script("7_evaluate.sh", adapter, data, **results)
    assert done.returncode == 0 and "kept from before" not in done.stdout and "exact match 100.0 %" not in done.stdout
    again = script("7_evaluate.sh", adapter, data, **results)
    assert "kept from before" in again.stdout


def test_a_base_that_has_moved_is_named_and_given_again(adapter: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nowhere/model"}))
    done = script("6_generate.sh", moved, TAUGHT[0][0])
    assert done.returncode == 2 and "is an adapter of nowhere/model" in done.stderr and "set BASE" in done.stderr
    given = script("6_generate.sh", moved, TAUGHT[2][0], BASE=str(taught_folder()), CONTROL="<short>", MAX_NEW_TOKENS="12")
    assert given.returncode == 0 and given.stdout.startswith(peft_answer(adapter, TAUGHT[2][0]))
