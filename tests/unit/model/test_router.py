"""Routers choose experts and weights as transformers' routers do, given the same logits; load is counted without padding."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from megatron.sft.families.architecture import MoEConfig
from megatron.sft.model.experts.balance import Balance, load_of
from megatron.sft.model.experts.router import routed, scores_of

TOKENS, EXPERTS, HIDDEN = 50, 16, 32
GROUPS = {"n_group": 4, "topk_group": 2, "n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
GROUPED = {"num_groups": 4, "chosen_groups": 2, "scale": 2.5}
SIGMOID = {"scores": "sigmoid", "correction_bias": True, "least_sum": 1e-20, **GROUPED}
# Class of transformers' configuration, its fields, the router's module and class, and ours.
ROUTERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "DeepSeek-V3": ("DeepseekV3", GROUPS, "DeepseekV3TopkRouter", {"normalized": True, **SIGMOID}),
    "DeepSeek-V3, weights as they are": (
        "DeepseekV3",
        {**GROUPS, "norm_topk_prob": False},
        "DeepseekV3TopkRouter",
        {"normalized": False, **SIGMOID},
    ),
    "DeepSeek-V2": (
        "DeepseekV2",
        {**GROUPS, "topk_method": "group_limited_greedy"},
        "DeepseekV2TopkRouter",
        {"normalized": False, "group_score": "best", **GROUPED},
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2",
        {**GROUPS, "topk_method": "greedy"},
        "DeepseekV2TopkRouter",
        {"normalized": False, "scale": 2.5},
    ),
    "ERNIE": (
        "Ernie4_5_Moe",
        {"moe_num_experts": EXPERTS, "moe_k": 3, "moe_norm_min": 0.3},
        "Ernie4_5_MoeTopKRouter",
        {"normalized": True, "correction_bias": True, "least_sum": 0.3},
    ),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 3},
        "GptOssTopKRouter",
        {"normalized": True, "router_bias": True},
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_and_weights_are_those_of_transformers(name: str) -> None:
    kind, fields, router_class, ours = ROUTERS[name]
    config = getattr(transformers, f"{kind}Config")(hidden_size=HIDDEN, **fields)
    module = __import__(f"transformers.models.{config.model_type}.modeling_{config.model_type}", fromlist=[router_class])
    theirs = getattr(module, router_class)(config)
    torch.manual_seed(0)
    correction = None
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *theirs.buffers()):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        for key, values in theirs.state_dict().items():
            correction = values.flatten() if key.endswith("e_score_correction_bias") else correction
    moe = MoEConfig(num_experts=EXPERTS, experts_per_token=3, ffn_hidden_size=8, **ours)
    assert (correction is not None) == moe.correction_bias
    logits, weights, experts = theirs(torch.randn(TOKENS, HIDDEN))
    mine = logits.detach().float().requires_grad_()
    found, chosen = routed(mine, correction, moe)
    dense = [
        torch.zeros(TOKENS, EXPERTS).scatter(1, where, what.float()) for where, what in ((experts, weights), (chosen, found))
    ]
    torch.testing.assert_close(dense[1], dense[0], rtol=1e-5, atol=1e-7)
    upstream = torch.randn(TOKENS, EXPERTS)
    (of_theirs,) = torch.autograd.grad((dense[0] * upstream).sum(), logits)
    (of_ours,) = torch.autograd.grad((dense[1] * upstream).sum(), mine)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-4, atol=1e-6)


def test_padding_does_not_count_in_the_load_and_sigmoid_scores_are_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's report, equations 17 to 20, on one sequence: f_i from the chosen experts, P_i from shares of scores."""
    config: Any = SimpleNamespace(sequence_parallel=False, fp16=False)
    monkeypatch.setattr(Balance, "_sharing", lambda self: None)
    moe = MoEConfig(EXPERTS, 3, 8, normalized=True, scores="sigmoid")
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1), requires_grad=True)
    real = torch.arange(TOKENS) % 5 != 4
    weights, chosen = routed(logits, None, moe)
    shares = scores_of(logits, moe) / scores_of(logits, moe).sum(dim=-1, keepdim=True)
    balance = Balance(config, EXPERTS)
    result = balance.weigh(weights, shares, chosen, real, torch.tensor(0.25))
    assert torch.equal(result, weights)
    (given,) = torch.autograd.grad((result * 0).sum(), logits, retain_graph=True)
    kept, counts = shares[real], torch.bincount(chosen[real].flatten(), minlength=EXPERTS)
    expected = (EXPERTS / 3 * counts / len(kept) * kept.mean(dim=0)).sum() * 3
    (wanted,) = torch.autograd.grad(0.25 * expected, logits)
    torch.testing.assert_close(given, wanted)
    load = load_of(torch.stack([torch.zeros(EXPERTS + 2, dtype=torch.float64), balance.taken(torch.device("cpu"))]))
    assert load is not None and load.worst_layer == 1 and load.loss == pytest.approx(float(expected), rel=1e-6)
    assert load.mean == load.worst == pytest.approx(float(counts.max() / counts.float().mean()))
    assert balance.taken(torch.device("cpu")).sum() == 0 and load_of(torch.zeros(2, EXPERTS + 2)) is None
