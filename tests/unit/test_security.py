"""What the source itself may not hold: loaders that run code, shells, and settings that let a model's own code run."""

import re
from pathlib import Path

import pytest

from tests.support import tiny

FORBIDDEN = {
    "pickle.load runs what a file says": r"\b(pickle|dill|cloudpickle|joblib|marshal|shelve)\.(load|loads|open|Unpickler)\s*\(",
    "torch.load unpickles": r"\btorch\.load\s*\(",
    "weights_only=False unpickles": r"weights_only\s*=\s*False",
    "numpy may unpickle": r"allow_pickle\s*=\s*True",
    "eval and exec run text": r"(?<![\w.-])(eval|exec)\(",
    "a shell expands paths": r"shell\s*=\s*True|\bos\.(system|popen)\s*\(",
    "a model's own code": r"trust_remote_code\s*=\s*True|\"--trust.remote.code\"",
    "yaml.load makes objects": r"\byaml\.(load|full_load|unsafe_load)\s*\(",
    "a template outside the sandbox": r"jinja2\.(Environment|Template)\s*\(|from jinja2 import .*\b(Environment|Template)\b",
    "a name of a file in /tmp can be guessed": r"tempfile\.mktemp\s*\(",
}  # fmt: skip
SHELL_FORBIDDEN = {
    "eval": r"(^|[;&|]|\bthen|\bdo)\s*eval\s",
    "rm -rf": r"\brm\s+-\w*r",
    "a download that is run": r"(curl|wget)[^\n|]*\|\s*(ba)?sh",
    "bash -c with a variable": r"\b(ba)?sh\s+-c\s+[\"']?[^'\n]*\$",
    "a secret on a command line": r"--(hf-token|token|api-key|password)[ =]",
}


# The page of `show_sample --html` is a template of this package's own; no template of a user is rendered there.
ALLOWED = {"a template outside the sandbox": {"megatron/sft/data/preview.py"}}


def python_files() -> list[Path]:
    """The package and its tools; tests make malicious files and may load them to show that they are live."""
    return sorted((tiny.ROOT / "megatron").rglob("*.py")) + sorted((tiny.ROOT / "scripts").rglob("*.py"))


def shell_files() -> list[Path]:
    found = [path for folder in ("scripts", "tools") for path in (tiny.ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.suffix in (".sh", ".sbatch", ".bash", "") and path.name != "README")


def lines_with(pattern: str, files: list[Path]) -> list[str]:
    found = re.compile(pattern)
    return [
        f"{path.relative_to(tiny.ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if found.search(line)
    ]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_module_loads_in_a_way_that_runs_code(what: str) -> None:
    allowed = ALLOWED.get(what, ())
    files = [path for path in python_files() if str(path.relative_to(tiny.ROOT)) not in allowed]
    assert not lines_with(FORBIDDEN[what], files), what


@pytest.mark.parametrize("what", SHELL_FORBIDDEN)
def test_no_script_expands_what_it_is_given(what: str) -> None:
    assert not lines_with(SHELL_FORBIDDEN[what], shell_files()), what


def test_every_class_that_unpickles_runs_nothing() -> None:
    found = lines_with(r"Unpickler\(pickle", python_files())
    assert len(found) == 1 and found[0].startswith("megatron/sft/checkpoint/pickled.py"), found


def test_models_and_tokenizers_are_loaded_without_their_own_code() -> None:
    """transformers' default is to refuse; each call says so itself, or gives a folder that this project made."""
    calls = re.compile(r"(Auto\w+)\.from_(pretrained|config)\(")
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        for found in calls.finditer(text):
            call = text[found.start() : text.find("\n\n", found.start())]
            assert "trust_remote_code=False" in call, f"{path}: {found.group(0)}"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_patterns_find_what_they_are_for(what: str) -> None:
    examples = [
        "pickle.load(file)",
        "torch.load(path)",
        "weights_only=False",
        "np.load(p, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(x, shell=True)",
        "trust_remote_code=True",
        "yaml.load(file)",
        "jinja2.Environment()",
        "tempfile.mktemp()",
    ]
    assert any(re.search(FORBIDDEN[what], example) for example in examples)
