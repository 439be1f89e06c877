"""Every loss of pairs against TRL's own trainers in float32 on the same token ids: loss, metrics, gradients, and five steps' weights."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import pair_material as material
from tests.support import tiny

NUM_ROWS, LENGTH, STEPS = 20, 128, 5
COMMON = ["--precision", "fp32", "--global-batch-size", "4", "--micro-batch-size", "2", "--train-iters", str(STEPS)]
COMMON += ["--lr", "1e-3", "--min-lr", "1e-3", "--lr-decay-style", "constant", "--lr-warmup-iters", "0"]
# Our words and TRL's for each case.
SMOOTHED, DIVERGENT = {"label_smoothing": 0.1}, "f_divergence_type"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("", {"loss_type": ["sigmoid"]}),
    "a larger beta": ("--dpo-beta 0.7", {"loss_type": ["sigmoid"], "beta": 0.7}),
    "hinge": ("--dpo-loss hinge --dpo-beta 2", {"loss_type": ["hinge"], "beta": 2.0}),
    "ipo": ("--dpo-loss ipo", {"loss_type": ["ipo"]}),
    "sigmoid_norm": ("--dpo-loss sigmoid_norm", {"loss_type": ["sigmoid_norm"]}),
    "robust": ("--dpo-loss robust --dpo-label-smoothing 0.1", {"loss_type": ["robust"], **SMOOTHED}),
    "exo": ("--dpo-loss exo --dpo-label-smoothing 0.1", {"loss_type": ["exo_pair"], **SMOOTHED}),
    "nca": ("--dpo-loss nca", {"loss_type": ["nca_pair"]}),
    "bco_pair": ("--dpo-loss bco_pair", {"loss_type": ["bco_pair"]}),
    "sppo_hard": ("--dpo-loss sppo_hard", {"loss_type": ["sppo_hard"]}),
    "apo_zero": ("--dpo-loss apo_zero", {"loss_type": ["apo_zero"]}),
    "apo_down": ("--dpo-loss apo_down", {"loss_type": ["apo_down"]}),
    "discopop": ("--dpo-loss discopop", {"loss_type": ["discopop"]}),
    "an SFT part": ("--sft-weight 0.3", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    "forward_kl": ("--dpo-f-divergence forward_kl", {"loss_type": ["sigmoid"], DIVERGENT: "forward_kl"}),
    "js_divergence": ("--dpo-f-divergence js_divergence --dpo-loss ipo", {"loss_type": ["ipo"], DIVERGENT: "js_divergence"}),
    "alpha_divergence": ("--dpo-f-divergence alpha_divergence", {"loss_type": ["sigmoid"], DIVERGENT: "alpha_divergence"}),
    "another alpha": (
        "--dpo-f-divergence alpha_divergence --dpo-f-alpha 2 --dpo-loss hinge",
        {"loss_type": ["hinge"], DIVERGENT: "alpha_divergence", "f_alpha_divergence_coef": 2.0},
    ),
    "long answers weigh less": ("--dpo-ld-alpha 0.3", {"loss_type": ["sigmoid"], "ld_alpha": 0.3}),
    "long answers, means": ("--dpo-ld-alpha 0 --dpo-loss sigmoid_norm", {"loss_type": ["sigmoid_norm"], "ld_alpha": 0.0}),
}
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one near it as the reference, both also converted, and pairs."""
    folder = tmp_path_factory.mktemp("trl")
    tiny.save_qwen2(folder / "model", tied=False)
    material.save_changed(folder / "model", folder / "reference", by=0.02)
    for name in ("model", "reference"):
        tiny.run_module("convert", "--hf-dir", folder / name, "--output", folder / f"{name}.ckpt")
    material.write_pair_rows(folder / "pairs", material.random_pair_rows(NUM_ROWS, LENGTH), LENGTH)
    return folder


@pytest.mark.timeout(600)
def test_loss_metrics_and_gradients_of_every_dpo_loss_are_trls(folder: Path) -> None:
    found = json.loads(tiny.launch_test_worker(1, Path(__file__), folder).strip().splitlines()[-1])
    assert found.keys() == CASES.keys()
    for name, (ours, theirs, difference) in found.items():
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
        assert difference <= 1e-5, (name, difference)


def compare() -> None:
    """In a process of its own: every case by the engine and by TRL, on the pairs of the first step."""
    from transformers import AutoModelForCausalLM

    from megatron.sft.model import process_groups
    from megatron.sft.planning.options import parse
    from megatron.sft.planning.resolution import plan_run
    from megatron.sft.runtime import device

    device.prepare()
    folder, found = Path(sys.argv[1]), {}
    paths = ["--load", folder / "model.ckpt", "--data-path", folder / "pairs", "--reference", folder / "reference.ckpt"]
    rows = material.random_pair_rows(NUM_ROWS, LENGTH)
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("model", "reference")}
    ours = {}
    with device.process_group():
        for name, (words, _) in CASES.items():
            arguments = [*map(str, paths), "--save", str(folder / "run"), "--objective", "dpo", *COMMON, "--clip-grad", "0"]
            mode, options = parse(["train", *arguments, *words.split()])
            plan = plan_run(mode, options, 1)
            with process_groups.model_parallel(plan.layout, options.seed):
                ours[name] = material.first_step(plan)
    material.leave_run()
    for name, (_, settings) in CASES.items():
        metrics, gradients, numbers = ours[name]
        theirs = material.trl_first_step(models, folder / "trl", settings, [pair for n in numbers for pair in rows[n]])
        found[name] = ([metrics[key] for key in ("loss", *METRICS)], [theirs[0][key] for key in ("loss", *METRICS)])
        found[name] += (material.largest_difference(gradients, theirs[1]),)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    compare()
