"""What is computed again changes no loss, and fp16 with its loss scale stays near float32: through the engine, on CPU."""

import json
import sys
from pathlib import Path

import pytest

from tests.campaigns import resume_on_gpu
from tests.support import tiny, tiny_families

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


def _outputs(model: Path, *words: str) -> str:
    """The last line of this script: losses of all cases, or of these words for RECOMPUTE in float32."""
    return tiny.run_script(Path(__file__), model, *words).strip().splitlines()[-1]


def test_recomputing_gives_the_same_losses_and_fp16_ones_like_them(tmp_path: Path) -> None:
    found, kept = json.loads(_outputs(tiny.save_qwen2(tmp_path / "model", tied=False)))
    assert len(set(found["fp32 none"])) == STEPS
    assert all(found[f"fp32 {each}"] == found["fp32 none"] for each in ("selective", "1 of 3", "2 of 3", "full", "auto"))
    for half in ("fp16 none", "bf16 none"):
        assert all(abs(a - b) <= 1e-3 * b for a, b in zip(found[half], found["fp32 none"], strict=True))
    none, selective, one, two, full = (kept[f"fp32 {each}"] for each in ("none", "selective", "1 of 3", "2 of 3", "full"))
    assert none > selective > one > two > full
    # Every layer that is recomputed whole keeps as much less as another.
    assert selective - one == one - two == two - full


def test_recomputing_latent_attention_gives_the_same_losses(tmp_path: Path) -> None:
    """Queries, keys and values are made again of the vectors; without a vector for queries, of two products of one norm."""
    for family in ("deepseek_v3_moe", "deepseek_v2_moe", "glm4_moe_lite"):
        found, kept = json.loads(_outputs(tiny_families.save_family(tmp_path / family, family), "none", "selective", "full"))
        assert len(set(found["fp32 none"])) == STEPS
        assert found["fp32 selective"] == found["fp32 none"] == found["fp32 full"]
        assert kept["fp32 none"] > kept["fp32 selective"] > kept["fp32 full"]


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_every_precision_and_optimizer_resumes_on_a_gpu_as_if_it_had_not_stopped() -> None:
    resume_on_gpu.check(list(resume_on_gpu.KINDS))


if __name__ == "__main__":
    words = sys.argv[2:] or ("none", "selective", "full", "auto")
    cases = {f"fp32 {word}": ("fp32", word) for word in words}
    if not sys.argv[2:]:
        cases |= {f"fp32 {count} of 3": ("fp32", "selective", count) for count in (1, 2)}
        cases |= {"bf16 none": ("bf16", "none"), "fp16 none": ("fp16", "none")}
    found = {name: _losses(Path(sys.argv[1]), *case) for name, case in cases.items()}
    print(json.dumps([{name: each[index] for name, each in found.items()} for index in range(2)]))
