"""The parts of models that benchmarks measure are the same for our stack and its peer."""

import shlex

import pytest
import torch

from benchmarks import cluster
from benchmarks.models import cut_architecture, cut_config
from benchmarks.train import parse
from megatron.sft.planning.memory import num_parameters
from megatron.sft.runtime.errors import UserError


@pytest.mark.parametrize(
    ("cut", "experts"),
    [
        (["openai/gpt-oss-20b", "--layers", "2"], [32, 32]),
        (["zai-org/GLM-4.5-Air", "--layers", "2", "--skip-layers", "1", "--experts", "32"], [32, 32]),
        (["deepseek-ai/DeepSeek-V3", "--layers", "1", "--skip-layers", "3", "--experts", "64"], [64]),
        (["baidu/ERNIE-4.5-21B-A3B-PT", "--layers", "3", "--experts", "16"], [0, 16, 16]),
        (["Qwen/Qwen3.5-35B-A3B", "--layers", "4", "--experts", "64"], [64, 64, 64, 64]),
    ],
)
def test_a_cut_mixture_has_the_weights_of_transformers_model(cut: list[str], experts: list[int]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = parse(["--model", *cut])
    architecture = cut_architecture(arguments)
    assert architecture.moe is not None
    assert [architecture.moe.num_experts * layer.experts for layer in architecture.layers] == experts
    whole = AutoConfig.for_model(**cut_config(arguments))
    config = whole.get_text_config()
    config.tie_word_embeddings = whole.tie_word_embeddings
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    counted = (parameter for parameter in theirs.parameters() if parameter.requires_grad)
    assert num_parameters(architecture) == sum(parameter.numel() for parameter in counted)


def test_layers_and_experts_that_a_model_has_not_are_refused() -> None:
    for cut, reason in ((["--layers", "99"], "has 28 layers"), (["--experts", "4"], "has none")):
        with pytest.raises(UserError, match=reason):
            cut_architecture(parse(["--model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", *cut]))


@pytest.mark.parametrize("name", cluster.SUITES)
def test_every_case_of_a_suite_fits_the_gpus_that_it_is_for(name: str) -> None:
    for case in cluster.suite(name):
        arguments = parse(shlex.split(case))
        arguments.gpus, arguments.stack = {"two": 2, "four": 4, "eight": 8}[name.partition("-")[0]], "ours"
        expected = cluster.expect(arguments)
        assert 5 < expected.memory_gib < 0.96 * 79 and expected.time.total > 0, case
