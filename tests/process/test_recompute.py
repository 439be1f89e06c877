"""What is computed again changes no loss, and fp16 with its loss scale stays near float32: through the engine, on CPU."""

import json
import sys
from pathlib import Path

import pytest

from tests.campaigns import resume_on_gpu
from tests.support import tiny

STEPS = 4


def _losses(folder: Path, precision: str, recompute: str, layers: int = 0) -> tuple[list[float], int]:
    """Losses, and the bytes that the first forward pass keeps for its backward pass, weights included."""
    import torch

    from benchmarks import ours, train

    words = ["--model", folder, "--row-length", 128, "--conversations", "50,40,38", "--trained", 0.6, "--stack", "ours"]
    words += ["--steps", STEPS, "--warm-up", 0, "--precision", precision]
    words += ["--recompute", recompute, "--recompute-layers", layers]
    arguments = train.parse(list(map(str, words)))
    rows = train.make_rows(128, arguments.conversations, 0.6, tiny.VOCAB_SIZE, 32)
    held: dict[int, torch.UntypedStorage] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        if not kept:
            sizes = {storage.data_ptr(): storage.size() for storage in held.values()}
            kept.append(sum(sizes.values()))  # freed storages have size 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        losses = ours.measure_steps(arguments, rows)[1]
    return losses, kept[0]


def test_recomputing_gives_the_same_losses_and_fp16_ones_like_them(tmp_path: Path) -> None:
    output = tiny.run_script(Path(__file__), tiny.save_qwen2(tmp_path / "model", tied=False))
    found, kept = json.loads(output.strip().splitlines()[-1])
    assert len(set(found["fp32 none"])) == STEPS
    assert all(found[f"fp32 {each}"] == found["fp32 none"] for each in ("selective", "1 of 3", "2 of 3", "full", "auto"))
    for half in ("fp16 none", "bf16 none"):
        assert all(abs(a - b) <= 1e-3 * b for a, b in zip(found[half], found["fp32 none"], strict=True))
    none, selective, one, two, full = (kept[f"fp32 {each}"] for each in ("none", "selective", "1 of 3", "2 of 3", "full"))
    assert none > selective > one > two > full
    # Every layer that is recomputed whole keeps as much less as another.
    assert selective - one == one - two == two - full


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_every_precision_and_optimizer_resumes_on_a_gpu_as_if_it_had_not_stopped() -> None:
    resume_on_gpu.check(list(resume_on_gpu.KINDS))


if __name__ == "__main__":
    words = ("none", "selective", "full", "auto")
    cases = {**{f"fp32 {word}": ("fp32", word) for word in words}, "bf16 none": ("bf16", "none"), "fp16 none": ("fp16", "none")}
    cases |= {f"fp32 {count} of 3": ("fp32", "selective", count) for count in (1, 2)}
    found = {name: _losses(Path(sys.argv[1]), *case) for name, case in cases.items()}
    print(json.dumps([{name: each[index] for name, each in found.items()} for index in range(2)]))
