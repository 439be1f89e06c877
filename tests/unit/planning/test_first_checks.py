"""What is wrong with settings by themselves is found before anything is counted with them."""

from pathlib import Path

import pytest

from megatron.sft.planning.options import parse
from megatron.sft.planning.planner import add_needs
from megatron.sft.planning.resolution import resolve


@pytest.mark.parametrize(
    "setting",
    [
        "SEED --seed -1", "SEED --seed 99999999999999999999", "SAVE_INTERVALS --save-interval 0", "EPOCHS --epochs nan",
        "EPOCHS --epochs inf", "LR --lr inf", "LR --lr nan", "WEIGHT_DECAY --weight-decay -0.1", "CLIP_GRAD --clip-grad -1",
        "ADAM_BETA1 --adam-beta1 1", "ADAM_EPS --adam-eps -1", "KEEP_LAST --keep-last -1", "EVAL_ITERS --eval-iters -1",
        "LR_WARMUP_FRACTION --lr-warmup-fraction 1.5", "LR_WARMUP_ITERS --lr-warmup-iters -2", "LORA_ALPHA --lora-alpha nan",
        "DISTRIBUTED_TIMEOUT_MINUTES --distributed-timeout-minutes 0", "OUTPUT_PATH --save {file}",
        "WATCHDOG_MINUTES --watchdog-minutes 20", "DISTRIBUTED_TIMEOUT_MINUTES --distributed-timeout-minutes 8",
        "OUTPUT_PATH --save {file}/run", "OUTPUT_PATH --save ~/run", "DATA_PATH --data-path {file}",
    ],
)  # fmt: skip
def test_each_impossible_setting_is_a_problem_with_its_name_and_value(
    converted: Path, packed_rows: Path, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "file.jsonl").write_text("x")
    variable, option, value = setting.format(file=tmp_path / "file.jsonl").split(" ")
    given = {"--load": str(converted), "--data-path": str(packed_rows), "--save": str(tmp_path / "run")}
    given |= {"--global-batch-size": "2", option: value}
    found = resolve("train", parse([word for pair in given.items() for word in pair])[1], 1)
    add_needs(found)  # what `plan` counts, too, with what is left
    shown = str(float(value)) if value[-1].isdigit() and option not in ("--seed",) else value
    assert any(variable in problem and (value in problem or shown in problem) for problem in found.problems), found.problems
