"""The interleaved pipeline: several model chunks on each stage train, save and resume as one model does."""

import re
from pathlib import Path

import pytest

from megatron.sft.families.registry import read_architecture
from megatron.sft.model.layout import Layout, check_layout
from megatron.sft.planning.options import parse
from megatron.sft.planning.resolution import plan_run
from megatron.sft.runtime.errors import UserError
from tests.support import layout_material

INTERLEAVED = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of four layers."""
    folder = tmp_path_factory.mktemp("four_layers")
    layout_material.save_models(folder, {"plain"})
    return folder / "plain"


def test_a_step_must_have_a_multiple_of_the_stages_in_micro_batches(
    four_layers: Path, packed_rows: Path, tmp_path: Path
) -> None:
    common = ["--load", four_layers, "--data-path", packed_rows, "--save", tmp_path / "run", "--train-iters", "10"]
    arguments = [*map(str, common), *INTERLEAVED, "--micro-batch-size", "2", "--global-batch-size"]
    assert plan_run(*parse([*arguments, "12"]), num_processes=2).num_micro_batches == 6
    with pytest.raises(UserError, match=re.escape("GLOBAL_BATCH_SIZE=10 makes 5 micro-batches")) as refused:
        plan_run(*parse([*arguments, "10"]), num_processes=2)
    assert str(refused.value).endswith("multiple of PP=2: take 12")


@pytest.mark.parametrize(
    ("num_layers", "stages", "chunks", "advice"),
    [
        (4, 1, 2, "VIRTUAL_PIPELINE_SIZE=2 needs pipeline stages"),
        (24, 4, 4, "choose VIRTUAL_PIPELINE_SIZE from 1, 2, 3, 6"),
        (7, 2, 2, "choose VIRTUAL_PIPELINE_SIZE from 1"),
    ],
)
def test_chunks_of_different_sizes_are_refused(num_layers: int, stages: int, chunks: int, advice: str) -> None:
    from transformers import Qwen2Config

    config = {**Qwen2Config(num_hidden_layers=num_layers, use_sliding_window=False).to_dict()}
    architecture = read_architecture({**config, "architectures": ["Qwen2ForCausalLM"]}, "config.json")
    with pytest.raises(UserError, match=re.escape(advice)):
        check_layout(Layout(pipeline_parallel=stages, virtual_pipeline=chunks), architecture)
