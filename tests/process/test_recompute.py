"""What is computed again changes no loss, and fp16 with its loss scale stays near float32: through the engine, on CPU."""

import json
import sys
from pathlib import Path

import pytest

from tests.campaigns import resume_on_gpu
from tests.support import tiny

STEPS = 4


def _losses(folder: Path, precision: str, recompute: str) -> list[float]:
    from benchmarks import ours, train

    words = ["--model", folder, "--row-length", 128, "--conversations", "50,40,38", "--trained", 0.6, "--stack", "ours"]
    words += ["--steps", STEPS, "--warm-up", 0, "--precision", precision, "--recompute", recompute]
    arguments = train.parse(list(map(str, words)))
    rows = train.make_rows(128, arguments.conversations, 0.6, tiny.VOCAB_SIZE, 32)
    return ours.measure_steps(arguments, rows)[1]


def _outputs(model: Path, *words: str) -> str:
    """The last line of this script: losses of all cases, or of these words for RECOMPUTE in float32."""
    return tiny.run_script(Path(__file__), model, *words).strip().splitlines()[-1]


def test_recomputing_gives_the_same_losses_and_fp16_ones_like_them(tmp_path: Path) -> None:
    found = json.loads(_outputs(tiny.save_qwen2(tmp_path / "model", tied=False)))
    assert len(set(found["fp32 none"])) == STEPS
    assert found["fp32 selective"] == found["fp32 none"] == found["fp32 full"] == found["fp32 auto"]
    for half in ("fp16 none", "bf16 none"):
        assert all(abs(a - b) <= 1e-3 * b for a, b in zip(found[half], found["fp32 none"], strict=True))


def test_recomputing_latent_attention_gives_the_same_losses(tmp_path: Path) -> None:
    """Queries, keys and values are made again of the vectors; without a vector for queries, of two products of one norm."""
    for family in ("deepseek_v3_moe", "deepseek_v2_moe", "glm4_moe_lite"):
        found = json.loads(_outputs(tiny.save_family(tmp_path / family, family), "none", "selective", "full"))
        assert len(set(found["fp32 none"])) == STEPS
        assert found["fp32 selective"] == found["fp32 none"] == found["fp32 full"]


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_every_precision_and_optimizer_resumes_on_a_gpu_as_if_it_had_not_stopped() -> None:
    resume_on_gpu.check(list(resume_on_gpu.KINDS))


if __name__ == "__main__":
    cases = [("fp32", "none"), ("fp32", "selective"), ("fp32", "full"), ("fp32", "auto"), ("bf16", "none"), ("fp16", "none")]
    cases = [("fp32", word) for word in sys.argv[2:]] or cases
    print(json.dumps({f"{p} {r}": _losses(Path(sys.argv[1]), p, r) for p, r in cases}))
