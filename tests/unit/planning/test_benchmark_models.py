"""The models that benchmarks cut to fit a GPU: both stacks have the same."""

import pytest
import torch
import transformers

from benchmarks import models, train
from megatron.sft.hf.published_configs import published_configs
from megatron.sft.planning.memory import num_parameters
from megatron.sft.runtime.errors import UserError


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V3", "zai-org/GLM-4.7-Flash", "Qwen/Qwen3-30B-A3B"])
def test_a_mixture_cut_to_some_experts_has_no_dense_layers_and_the_size_of_the_peers(name: str) -> None:
    architecture = models.cut_architecture(train.parse(["--model", name, "--layers", "2", "--experts", "16"]))
    assert [layer.experts for layer in architecture.layers] == [True, True]
    config = transformers.AutoConfig.for_model(**published_configs()[name])
    models.cut_config(config, 2, 16)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config)
    assert num_parameters(architecture) == sum(parameter.numel() for parameter in peer.parameters())


@pytest.mark.parametrize(("experts", "reason"), [(4, "deepseek-ai/DeepSeek-V3 has 256"), (36, "8 groups of two or more")])
def test_numbers_of_experts_that_do_not_fit_the_router_are_refused(experts: int, reason: str) -> None:
    with pytest.raises(UserError, match=f"--experts {experts}: {reason}"):
        models.cut_architecture(train.parse(["--model", "deepseek-ai/DeepSeek-V3", "--experts", str(experts)]))
