"""The tiny model and data set of scripts/quickstart.sh: sorting names, with `<short>` and `<think>` answers.

python -m megatron.sft.quickstart data                    remake the files in assets/quickstart
python -m megatron.sft.quickstart model OUT_DIR           a Hugging Face folder with weights from a seed
python -m megatron.sft.quickstart report --before B.json --after A.json --metrics metrics.jsonl ... --output report.json
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.sft.hf import names
from megatron.sft.inference.comparison import write_comparison
from megatron.sft.reporting.curves import read_curve
from megatron.sft.runtime.errors import OneLineParser, run
from megatron.sft.runtime.manifest import read_json, sha256_of_file, write_json, write_text
from megatron.sft.runtime.whole_folder import whole_folder

NAMES = (
    *("Ada", "Ben", "Cal", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia"),
    *("Ned", "Ola", "Pam", "Quin", "Ray", "Sam", "Tom", "Una", "Val", "Wes", "Xia", "Yan", "Zoe"),
)
SHORT, THINK, END_THINK = "<short>", "<think>", "</think>"
# How Qwen2 splits text before its byte-pair merges; transformers 5 uses this for the family whatever tokenizer.json says.
QWEN2_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_NAMES = (3, 4, 5)  # in a question
NUM_TRAINING_QUESTIONS = 3000
NUM_HELD_OUT_QUESTIONS = 240
SEED = 2024

ASSETS = names.ASSETS / "quickstart"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SOURCE_MANIFEST = "quickstart.json"


@dataclass(frozen=True)
class Question:
    """Names to be sorted, in the order in which the question gives them."""

    names: tuple[str, ...]

    @property
    def text(self) -> str:
        return "Sort these names: " + " ".join(self.names)

    @property
    def answer(self) -> str:
        return " ".join(sorted(self.names))

    @property
    def work(self) -> str:
        """Sorting by insertion: each name in turn is put in its place among those before it."""
        added = [f"Add {self.names[n]}: {' '.join(sorted(self.names[: n + 1]))}." for n in range(1, len(self.names))]
        return " ".join([f"{self.names[0]}.", *added])

    def records(self) -> list[dict[str, str]]:
        """The question answered directly and answered after the work; the answer's first token decides which."""
        outputs = (f"{SHORT} {self.answer}", f"{THINK} {self.work} {END_THINK} {self.answer}")
        return [{"instruction": self.text, "output": output} for output in outputs]


def make_questions(seed: int) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions. No set of names is asked twice, in any order, within or across the two."""
    generator = random.Random(seed)
    seen: set[frozenset[str]] = set()

    def draw(num_questions: int) -> list[Question]:
        questions: list[Question] = []
        while len(questions) < num_questions:
            names = tuple(generator.sample(NAMES, NUM_NAMES[len(questions) % len(NUM_NAMES)]))
            if frozenset(names) not in seen:
                seen.add(frozenset(names))
                questions.append(Question(names))
        return questions

    held_out = draw(NUM_HELD_OUT_QUESTIONS)
    return draw(NUM_TRAINING_QUESTIONS), held_out


def data_files(seed: int = SEED) -> dict[str, str]:
    """File name to its content, JSON lines."""
    training, held_out = make_questions(seed)
    records = {
        "train.json": [record for question in training for record in question.records()],
        "heldout.json": [{"instruction": question.text, "output": question.answer} for question in held_out],
    }
    return {name: "".join(json.dumps(record) + "\n" for record in of_file) for name, of_file in records.items()}


def make_tokenizer(seed: int = SEED) -> Any:
    """A byte-level BPE with the data's words as single tokens, and the control tokens, which are not special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    training, _ = make_questions(seed)
    roles = ("user\n", "assistant\n", "system\n")
    texts = [text for q in training for text in (*roles, q.text, f" {q.work}", f" {q.answer}")]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (SHORT, THINK, END_THINK)])
    return tokenizer


def make_model_folder(output: Path, seed: int = SEED) -> bool:
    """Write the untrained model whole or not at all; False if it is there already from the same sources."""
    sources = {"seed": seed, **{name: sha256_of_file(ASSETS / name) for name in MODEL_FILES}}
    if output.exists():
        made = read_json(output / SOURCE_MANIFEST, f"{output} is not a quickstart model:", "give another folder")
        weights = output / "model.safetensors"
        if made["sources"] == sources and weights.exists() and sha256_of_file(weights) == made["weights"]:
            return False
    with whole_folder(output, replace=True) as staged:
        _write_model(staged, seed)
        weights_sha256 = sha256_of_file(staged / "model.safetensors")
        write_json(staged / SOURCE_MANIFEST, {"sources": sources, "weights": weights_sha256})
    return True


def _write_model(folder: Path, seed: int) -> None:
    """Weights as transformers initializes them, but drawn in the order of their names, so that every version draws the same."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in MODEL_FILES:
        shutil.copyfile(ASSETS / name, folder / name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in sorted(model.named_parameters()):  # a tied output layer is named once, as the embedding
        if parameter.dim() > 1:
            state[name] = torch.normal(0.0, config.initializer_range, parameter.shape, generator=generator)
        else:
            state[name] = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


OWN_DATA = """Your own model and data, for example after bash scripts/1_download.sh model HuggingFaceTB/SmolLM2-135M-Instruct:
  bash scripts/2_convert.sh assets/checkpoints/HuggingFaceTB_SmolLM2_135M_Instruct 1 1
  bash scripts/3_tokenize.sh assets/checkpoints/HuggingFaceTB_SmolLM2_135M_Instruct my_chats.jsonl 2048
  bash tools/new_recipe mine assets/checkpoints/HuggingFaceTB_SmolLM2_135M_Instruct my_chats.jsonl 2048
  bash scripts/sft/mine.sh train   # or plan: what the run needs, without starting it"""


@dataclass(frozen=True)
class Report:
    """The quickstart's figures: shares of held-out questions answered correctly, the first and last logged loss, and where
    the trained model is."""

    exact_match_before: float
    exact_match_after: float
    held_out: int
    first_loss: float
    last_loss: float
    seconds: float
    export: str


def make_report(before: Path, after: Path, metrics: Path, export: str, seconds: float) -> Report:
    """Read the results of the two evaluations (megatron.sft.evaluate) and the training's metrics.jsonl.

    `UserError` if one of them is missing.
    """
    first, last = (read_json(path, "evaluation", "run scripts/7_evaluate.sh first") for path in (before, after))
    losses = read_curve(metrics, "quickstart").losses
    matches = (first["exact_match"], last["exact_match"])
    return Report(*matches, last["questions"], losses[0], losses[-1], round(seconds, 1), export)


def newcomer_lines(report: Report, after: dict[str, Any], folder: Path) -> str:
    """What was learned, in words for newcomers, and what to do next. after: the result of the second evaluation.
    folder: of the pictures."""
    modes = ", ".join(f"{mode['control']} {100 * mode['exact_match']:.0f} %" for mode in after["modes"])
    example = "Sort these names: Tom Ada Quin Ben"
    return (
        f"A tiny model learned to sort names; all five steps took {report.seconds:.0f} s.\n"
        f"It now answers {100 * report.exact_match_after:.0f} % of {report.held_out} questions that it was not trained on "
        f"({modes}); before, {100 * report.exact_match_before:.0f} %.\n"
        f"Look at, in {folder}: loss.png, scores.png, scores-answers.md (answers before and after), trained_tokens.html\n"
        f"The model is in {report.export}. Talk to it:\n"
        f'  bash scripts/6_generate.sh {report.export} "{example}"\n'
        f'  CONTROL="{THINK}" bash scripts/6_generate.sh {report.export} "{example}"\n'
        f"{OWN_DATA}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.command == "data":
        ASSETS.mkdir(parents=True, exist_ok=True)
        for name, text in data_files().items():
            write_text(ASSETS / name, text)
        make_tokenizer().save(str(ASSETS / "tokenizer.json"))
        print(f"wrote train.json, heldout.json and tokenizer.json to {ASSETS}")
    elif arguments.command == "model":
        made = make_model_folder(arguments.output)
        print(f"{arguments.output}: {'made, with weights from a seed' if made else 'exists already'}")
    else:
        seconds = time.time() - arguments.started
        report = make_report(arguments.before, arguments.after, arguments.metrics, arguments.export, seconds)
        write_json(arguments.output, asdict(report))
        results = [read_json(path, "evaluation", "run it first") for path in (arguments.before, arguments.after)]
        folders = [Path(result["model"]) for result in results]
        write_comparison(("before", "after"), folders, [[result] for result in results], arguments.output.with_name("scores"))
        print(newcomer_lines(report, results[1], arguments.output.parent))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="quickstart", description="The tiny model and data set of the quickstart.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", help="remake the data and tokenizer in assets/quickstart")
    model = commands.add_parser("model", help="write a Hugging Face folder with untrained weights")
    model.add_argument("output", type=Path)
    report = commands.add_parser("report", help="write report.json and print what was learned")
    for name in ("before", "after", "metrics", "output"):
        report.add_argument(f"--{name}", type=Path, required=True)
    report.add_argument("--export", required=True, help="folder of the trained model, as the user would type it")
    report.add_argument("--started", type=float, required=True, help="when the quickstart began, in seconds since 1970")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
