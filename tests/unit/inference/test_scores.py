"""Models side by side: the table, its picture, and results that are kept."""

import json
from pathlib import Path

import pytest

from megatron.sft.evaluate import named_models
from megatron.sft.inference.comparison import side_by_side
from megatron.sft.inference.lm_eval_tasks import task_scores
from megatron.sft.inference.scores import Score, draw, markdown, table_lines
from megatron.sft.inference.serving import serve_hint
from megatron.sft.runtime.errors import UserError


def test_table_has_a_line_a_figure_and_what_changed():
    before = [Score("gsm8k", "exact_match", 0.125, 0.01), Score("wiki", "perplexity", 12.5, None, False)]
    after = [Score("gsm8k", "exact_match", 0.5, 0.02), Score("wiki", "perplexity", 10.0, None, False), Score("x", "acc", 1.0)]
    rows = table_lines([before, after])
    assert markdown(["before", "after"], rows) == (
        "| task | metric | before | after | change |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| gsm8k | exact_match | 12.5 ± 1.0 % | 50.0 ± 2.0 % | +37.5 |\n"
        "| wiki | perplexity | 12.5 | 10 | -2.5 |\n"
        "| x | acc | - | 100.0 % |  |\n"
    )
    assert [row.is_better for row in rows] == [True, True, None]


def test_picture_grows_with_the_table(tmp_path: Path):
    rows = table_lines([[Score(f"task{number}", "acc", number / 10)] for number in range(1)])
    draw(["one"], rows, tmp_path / "a" / "one.png")
    draw(["one"], table_lines([[Score(f"task{number}", "acc", number / 10) for number in range(9)]]), tmp_path / "nine.png")
    heights = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (tmp_path / "a" / "one.png", tmp_path / "nine.png")]
    assert heights[1] > 3 * heights[0]


def test_answers_are_shown_side_by_side_and_those_that_changed_first():
    def records(*answers: tuple[str, bool]) -> list[dict[str, object]]:
        return [
            {"control": "", "question": f"q{index}", "reference": "r|", "answer": answer, "correct": correct}
            for index, (answer, correct) in enumerate(answers)
        ]

    results = [{"data": "d.json", "records": records(("a", False), ("b", False))}]
    results.append({"data": "d.json", "records": records(("c", False), ("line\ntwo", True))})
    assert side_by_side(["before", "after"], results) == (
        "## d.json: 2 questions\n\n| question | reference | before | after |\n|---|---|---|---|\n"
        "| q1 | r\\| | ✗ b | ✓ line<br>two |\n| q0 | r\\| | ✗ a | ✗ c |\n\n"
    )
    assert side_by_side(["before", "after"], [{"task": "gsm8k"}, {"task": "gsm8k"}]) == ""


def test_groups_stand_for_their_tasks():
    """The shape of lm-eval's results: a group with figures of its own, its tasks, and a task beside."""
    results = {
        "results": {
            "mmlu_law": {"alias": "law", "acc,none": 0.2, "acc_stderr,none": 0.1},
            "mmlu": {"alias": "mmlu", "acc,none": 0.3, "acc_stderr,none": 0.05},
            "gsm8k": {"exact_match,strict-match": 0.4, "exact_match_stderr,strict-match": "N/A", "sample_len": 3},
        },
        "groups": {"mmlu": {"alias": "mmlu", "acc,none": 0.3, "acc_stderr,none": 0.05}},
        "group_subtasks": {"mmlu": ["mmlu_law"]},
        "higher_is_better": {"mmlu": {"acc": True}, "gsm8k": {"exact_match": True}},
    }
    assert sorted(task_scores(results, "<short>"), key=lambda score: score.task) == [
        Score("gsm8k", "exact_match, strict-match, <short>", 0.4, None, True),
        Score("mmlu", "acc, <short>", 0.3, 0.05, True),
    ]


def test_models_are_named(tmp_path: Path):
    for name in ("a/run", "b/run", "c=d"):
        (tmp_path / name).mkdir(parents=True)
    a, b, c = tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c=d"
    assert named_models([f"before={a}", f"after={b}"]) == (["before", "after"], [a, b])
    assert named_models([str(a), str(b), str(c)])[0] == ["a/run", "b/run", f"{tmp_path.name}/c=d"]
    with pytest.raises(UserError, match=r"models are named x, x.* before="):
        named_models([f"x={a}", f"x={b}"])


def test_serve_hint_says_what_vllm_does_not_see_itself(tmp_path: Path):
    folder = tmp_path / "my model"
    folder.mkdir()
    config = {"max_position_embeddings": 131072, "num_attention_heads": 28, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    for number in range(2):
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            file.truncate(70_000_000_000)  # a file of holes: 140 GB of weights
    assert serve_hint(folder) == (
        f"vllm serve '{folder}' --served-model-name 'my model' --max-model-len 32768 --tensor-parallel-size 4"
    )
