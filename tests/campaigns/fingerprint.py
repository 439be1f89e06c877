"""What a fixed pipeline gives, as checksums and losses, to show that a change of the code changed no result.

PYTHONPATH=CHECKOUT python tests/campaigns/fingerprint.py OUT.json
python tests/campaigns/fingerprint.py --compare A.json B.json [--tolerance 1e-6]

It starts commands only, so that it runs on any commit that has them: tokenising of several formats, conversion to both
checkpoint formats, training in several layouts, export. Model cards, manifests and messages are left out.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[2] / "assets" / "quickstart"
OPTIONS = "--precision fp32 --lr 1e-3 --train-iters 6 --save-interval 3 --global-batch-size 8 --micro-batch-size 2"
OPTIONS += " --split 95,5,0"
LAYOUTS = {
    "one": (1, ""),
    "conversation average": (1, "--loss-average conversation --recompute full"),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2+SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel 1 --recompute selective"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "VPP": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "CP2": (2, "--context-parallel-size 2"),
    "DP2": (2, ""),
    "TP2xPP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "EP2": (2, "--expert-model-parallel-size 2"),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
}


def command(num_processes: int, module: str, *arguments: object) -> None:
    start = [sys.executable, "-m"]
    if num_processes:
        start += ["megatron.sft.launch", "--standalone", "--local-addr", "localhost", "--nproc-per-node", num_processes, "-m"]
    environment = {"MEGATRON_SFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    result = subprocess.run(
        [str(word) for word in [*start, f"megatron.sft.{module}", *arguments]],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    if result.returncode:
        raise SystemExit(f"{module} {arguments}: {result.stdout[-3000:]}")


def save_model(folder: Path, name: str) -> None:
    import torch
    import transformers

    family, changes = MODELS[name]
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 4, "vocab_size": 1301, "max_position_embeddings": 512, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in parameter_name else 0.1 * noise)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / file).write_bytes((QUICKSTART / file).read_bytes())


def write_data(folder: Path) -> list[Path]:
    """The quickstart's rows as instructions, as messages with system turns and groups, as CSV and as a JSON array."""
    rows = [json.loads(line) for line in (QUICKSTART / "train.json").read_text().splitlines()][:1200]
    messages = []
    for index in range(0, 600, 2):
        turns = [{"role": "system", "content": "Sort."}] if index % 3 else []
        for row in rows[index : index + 1 + index % 3]:
            turns += [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        messages.append({"messages": turns, "id": index})
    files = {
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "messages.json": json.dumps(messages, indent=1),
        "table.csv": "instruction,output\n" + "".join(f'"{r["instruction"]}","{r["output"]}"\n' for r in rows[:200]),
    }
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export_facts(folder: Path) -> dict[str, str]:
    """Checksums of every tensor, and of every file but the model card and its picture."""
    from safetensors.torch import load_file

    facts = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            facts |= {n: hashlib.sha256(t.contiguous().view(-1).numpy().tobytes()).hexdigest() for n, t in tensors.items()}
        elif path.suffix not in (".md", ".png"):
            facts[path.name] = sha256(path)
    return facts


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("validation_loss")) for line in lines]


def fingerprint(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in MODELS:
        save_model(work / name, name)
    tokenised = {}
    for data in write_data(work / "data"):
        for label, more in {"": [], " unpacked": ["--no-packing"], " last": ["--train-on", "last_assistant"]}.items():
            prefix = work / f"{data.stem}{label.strip()}"
            arguments = ["--tokenizer", work / "qwen2", "--input", data, "--seq-length", 192, "--output-prefix", prefix]
            command(0, "tokenize", *arguments, *more)
            found[f"data {data.stem}{label}"] = [sha256(prefix.with_suffix(f".{end}")) for end in ("bin", "idx")]
            tokenised[data.stem + label] = prefix
    both = ["--input", f"{work}/data/lines.jsonl#50%", "--input", f"{work}/data/messages.json"]
    command(0, "tokenize", "--tokenizer", work / "qwen2", *both, "--seq-length", 192, "--output-prefix", work / "both")
    found["data of two sources"] = [sha256(work / f"both.{end}") for end in ("bin", "idx", "sources")]
    jobs = [(name, layout) for name in MODELS for layout in LAYOUTS if (layout == "EP2") <= (name == "qwen3_moe")]
    few = ("one", "TP2", "PP2", "EP2", "TP2xPP2")
    jobs = [(name, layout) for name, layout in jobs if name == "qwen2" or layout in few]
    for name in MODELS:
        for form, sizes in (("torch_dist", ()), ("torch", ("--tensor-model-parallel-size", 2))):
            command(0, "convert", "--source", work / name, "--output", work / f"{name}.{form}", "--ckpt-format", form, *sizes)
            exported = work / f"{name}.{form}.hf"
            command(0, "export", "--load", work / f"{name}.{form}", "--hf-dir", work / name, "--output", exported)
            found[f"conversion {name} {form}"] = export_facts(exported)

    def train(job: tuple[str, str]) -> None:
        name, layout = job
        num_processes, options = LAYOUTS[layout]
        run = work / f"run {name} {layout}"
        paths = ["--load", work / f"{name}.torch_dist", "--data-path", work / "both", "--save", run]
        command(num_processes, "train", "train", *paths, *OPTIONS.split(), *options.split())
        found[f"losses {name} {layout}"] = losses(run)
        exported = work / f"export {name} {layout}"
        command(0, "export", "--load", run, "--hf-dir", work / name, "--output", exported)
        found[f"trained {name} {layout}"] = export_facts(exported)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, jobs))
    return dict(sorted(found.items()))


def equal(one: Any, other: Any, tolerance: float) -> bool:
    if not tolerance or one is None or other is None or len(one) != len(other):
        return bool(one == other)
    return all(abs(a - b) <= tolerance * abs(a) for a, b in zip(one, other, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of losses, relative; trained weights then do not count")
    arguments = parser.parse_args()
    if not arguments.compare:
        with tempfile.TemporaryDirectory() as work:
            found = fingerprint(Path(work))
        arguments.files[0].write_text(json.dumps(found, indent=1))
        print(f"{len(found)} results in {arguments.files[0]}")
        return 0
    one, other = (json.loads(path.read_text()) for path in arguments.files)
    if arguments.tolerance:
        one, other = ({name: value for name, value in side.items() if "trained" not in name} for side in (one, other))
    different = [
        name
        for name in sorted(one.keys() | other.keys())
        if not equal(one.get(name), other.get(name), arguments.tolerance if name.startswith("losses") else 0.0)
    ]
    for name in different:
        print(f"different: {name}")
    print(f"{len(one) - len(different)} of {len(one)} results are equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
