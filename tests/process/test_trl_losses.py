"""Every loss of pairs against TRL's own trainers in float32 on the same token ids: loss, metrics, gradients, and five steps'
weights."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import pair_material as material
from tests.support import tiny

NUM_ROWS, LENGTH, STEPS = 20, 3 * 56, 5
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
# As above, with TRL's trainers of CPO (and of SimPO, which is an option of it) and of ORPO. Prompts are one token long: TRL's
# ORPO trains prompts too, of which such a one has nothing to train.
FREE: dict[str, tuple[str, dict[str, Any]]] = {
    "simpo": (
        "--objective simpo --dpo-beta 2 --simpo-gamma 1",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    ),
    "simpo, smoothed, with an SFT part": (
        "--objective simpo --dpo-label-smoothing 0.2 --sft-weight 1",
        {"loss_type": "simpo", "cpo_alpha": 1.0, "label_smoothing": 0.2},
    ),
    "cpo": ("--objective cpo", {"loss_type": "sigmoid"}),
    "cpo, smoothed": ("--objective cpo --dpo-label-smoothing 0.1 --sft-weight 0.5", {"cpo_alpha": 0.5, "label_smoothing": 0.1}),
    "orpo": ("--objective orpo", {}),
    "orpo, a larger beta": ("--objective orpo --dpo-beta 0.8", {"beta": 0.8}),
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
    material.write_pair_rows(folder / "pairs", material.random_pair_rows(NUM_ROWS, LENGTH, most=3), LENGTH)
    material.write_pair_rows(folder / "short", material.random_pair_rows(NUM_ROWS, LENGTH, prompt=1), LENGTH)
    tiny.write_rows(folder / "conversations", tiny.random_rows(NUM_ROWS, LENGTH), LENGTH)
    return folder


@pytest.mark.timeout(600)
def test_loss_metrics_and_gradients_of_every_dpo_loss_are_trls(folder: Path) -> None:
    found = json.loads(tiny.launch_test_worker(1, Path(__file__), folder).strip().splitlines()[-1])
    assert found.keys() == CASES.keys() | FREE.keys() | {"dft"}
    for name, (ours, theirs, difference) in found.items():
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
        assert difference <= 1e-5, (name, difference)


def compare() -> None:
    """In its own process: every case by the engine and by TRL, on the pairs of the first step."""
    from transformers import AutoModelForCausalLM

    from megatron.sft.model import process_groups
    from megatron.sft.planning.options import parse
    from megatron.sft.planning.resolution import plan_run
    from megatron.sft.runtime import device

    device.prepare()
    folder, found = Path(sys.argv[1]), {}
    rows = {
        "pairs": material.random_pair_rows(NUM_ROWS, LENGTH, most=3),
        "short": material.random_pair_rows(NUM_ROWS, LENGTH, prompt=1),
    }
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("model", "reference")}
    with_reference = f"--objective dpo --reference {folder}/reference.ckpt"
    words = {name: ("pairs", f"{with_reference} {more}") for name, (more, _) in CASES.items()}
    words |= {name: ("short", more) for name, (more, _) in FREE.items()}
    words["dft"] = ("conversations", "--objective dft")
    ours = {}
    with device.process_group():
        for name, (data, more) in words.items():
            paths = f"--load {folder}/model.ckpt --data-path {folder}/{data} --save {folder}/run --clip-grad 0"
            mode, options = parse(["train", *paths.split(), *COMMON, *more.split()])
            plan = plan_run(mode, options, 1)
            with process_groups.model_parallel(plan.layout, options.seed):
                ours[name] = material.first_step(plan)
    material.leave_run()
    for name, (data, _) in words.items():
        metrics, gradients, numbers = ours[name]
        if name == "dft":
            conversations = [one for n in numbers for one in tiny.random_rows(NUM_ROWS, LENGTH)[n]]
            theirs = material.trl_dft(models["model"], folder / "trl", conversations)
            difference = material.largest_difference(gradients, theirs["gradients"])
            found[name] = [[metrics["loss"]], [theirs["loss"]], difference]
            continue
        pairs = [pair for n in numbers for pair in rows[data][n]]
        if name in CASES:
            theirs = material.trl_first_step(models, folder / "trl", CASES[name][1], pairs)
        else:
            kind, settings = name.partition(",")[0], FREE[name][1]
            theirs = material.trl_reference_free(kind, models["model"], folder / "trl", settings, pairs)
        found[name] = [[each[key] for key in ("loss", *METRICS)] for each in (metrics, theirs)]
        found[name].append(material.largest_difference(gradients, theirs["gradients"]))
    print(json.dumps(found), flush=True)


@pytest.mark.timeout(600)
def test_five_steps_give_the_weights_of_trl(folder: Path, tmp_path: Path) -> None:
    """The whole run by its commands, the reference's log-probabilities included, against TRL's training loop."""
    words = f"--load {folder}/model.ckpt --data-path {folder}/pairs --reference {folder}/reference.ckpt --sft-weight 0.2"
    tiny.launch(1, "train", "train", *words.split(), "--objective", "dpo", "--save", tmp_path / "run", *COMMON)
    tiny.run_module("export", "--load", tmp_path / "run", "--hf-dir", folder / "model", "--output", tmp_path / "ours")
    tiny.run_script(Path(__file__), "train", folder, tmp_path / "trl")
    before, ours, theirs = (tiny.tensors(path) for path in (folder / "model", tmp_path / "ours", tmp_path / "trl"))
    assert ours.keys() == theirs.keys() == before.keys()
    for name, tensor in ours.items():
        assert (tensor - before[name]).norm() > 1e-3, name
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=2e-5, msg=name)


def train_with_trl(folder: Path, output: Path) -> None:
    """In its own process: the same five steps by TRL."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from megatron.sft.data.row_order import RowOrder

    rows, order = material.random_pair_rows(NUM_ROWS, LENGTH, most=3), RowOrder(np.arange(NUM_ROWS), seed=1234)
    steps = [[pair for i in range(4) for pair in rows[order.row_at(4 * step + i)]] for step in range(STEPS)]
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("model", "reference")}
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
    material.trl_five_steps(models, output / "trainer", settings, steps).save_pretrained(output)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train_with_trl(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        compare()
