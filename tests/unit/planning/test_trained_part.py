"""What LORA_* , FREEZE and TRAIN_ROUTER train, and that every setting without effect or sense is refused by name."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint
from megatron.sft.families.architecture import Architecture
from megatron.sft.families.lora import LoRA, adapted_weights
from megatron.sft.families.registry import read_architecture
from megatron.sft.families.trained import Trained
from megatron.sft.families.weight_names import weight_entries
from megatron.sft.planning.options import TrainOptions, options_record
from megatron.sft.planning.trained_part import check_same_training, describe, lr_hint, num_trained, trained_part
from megatron.sft.runtime.errors import UserError
from tests.support import peft_oracle, tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
SIZES |= {"num_hidden_layers": 3, "vocab_size": 131, "max_position_embeddings": 512, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "tied": LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
    "experts": Qwen3MoeConfig(**SIZES, **EXPERTS),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
ATTENTION, MLP = ("k_proj", "o_proj", "q_proj", "v_proj"), ("down_proj", "gate_proj", "up_proj")


def architecture(name: str) -> Architecture:
    return read_architecture(CONFIGS[name].to_dict(), "config.json")


def part(model: str = "qwen2", saved: LoRA | None = None, **settings: Any) -> Trained:
    paths = {"load": Path("load"), "data_path": Path("data"), "save": Path("save")}
    return trained_part(TrainOptions(**paths, **settings), architecture(model), saved)


def refusal(model: str = "qwen2", **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        part(model, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "words", "targets", "experts"),
    [
        ("qwen2", "all", tuple(sorted(ATTENTION + MLP)), False),
        ("qwen2", "attention", ATTENTION, False),
        ("qwen2", "mlp", MLP, False),
        ("qwen2", "v_proj, q_proj", ("q_proj", "v_proj"), False),
        ("qwen2", "attention down_proj", tuple(sorted([*ATTENTION, "down_proj"])), False),
        ("experts", "all", ATTENTION, False),
        ("experts", "all,experts", tuple(sorted(ATTENTION + MLP)), True),
        ("experts", "experts", MLP, True),
        ("mixtral", "all,experts", (*ATTENTION, "w1", "w2", "w3"), True),
    ],
)
def test_targets_are_words_and_names(model: str, words: str, targets: tuple[str, ...], experts: bool) -> None:
    lora = part(model, lora_rank=4, lora_targets=words).lora
    assert lora is not None
    assert (lora.targets, lora.experts, lora.alpha, lora.scale) == (targets, experts, 8.0, 2.0)
    modules = [weight.module(place) for weight in adapted_weights(architecture(model), lora) for place in weight.projections]
    assert {module.rpartition(".")[2] for module in modules} == set(targets) and len(modules) == len(set(modules))
    of_experts = [module for module in modules if ".experts." in module]
    assert len(of_experts) == (3 * 4 * 3 if experts else 0)


def test_trained_parameters_are_counted_as_peft_counts_them(tmp_path: Path) -> None:
    model = tiny.save_qwen2(tmp_path / "model", tied=False)
    folder = peft_oracle.save_adapter(model, tmp_path / "adapter", rank=5, target_modules="all-linear")
    shape = read_architecture(Qwen2Config.from_pretrained(model).to_dict(), "config.json")
    counted = num_trained(shape, Trained(LoRA(5, 10.0, tuple(sorted(ATTENTION + MLP)))))
    assert counted == sum(prod(tensor.shape) for tensor in tiny.tensors(folder).values())  # type: ignore[attr-defined]


LORA: dict[str, Any] = {"lora_rank": 4}
REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("qwen2", {"lora_alpha": 32.0, "lora_dropout": 0.1}, ["LORA_ALPHA, LORA_DROPOUT without LORA_RANK"]),
    ("qwen2", {"lora_plus": 4.0}, ["LORA_PLUS without LORA_RANK"]),
    ("qwen2", {"lora_rank": -1}, ["LORA_RANK=-1"]),
    ("qwen2", {**LORA, "lora_alpha": -2.0}, ["LORA_ALPHA=-2"]),
    ("qwen2", {**LORA, "lora_alpha": float("nan")}, ["LORA_ALPHA=nan"]),
    ("qwen2", {**LORA, "lora_dropout": 1.0}, ["LORA_DROPOUT=1"]),
    ("qwen2", {**LORA, "lora_dropout": -0.1}, ["LORA_DROPOUT=-0.1"]),
    ("qwen2", {**LORA, "lora_plus": 0.0}, ["LORA_PLUS=0"]),
    ("qwen2", {**LORA, "lora_plus": float("inf")}, ["LORA_PLUS=inf"]),
    ("qwen2", {**LORA, "lora_targets": "c_attn"}, ["LORA_TARGETS='c_attn'", "q_proj"]),
    ("qwen2", {**LORA, "lora_targets": "lm_head"}, ["LORA_TARGETS='lm_head'"]),
    ("qwen2", {**LORA, "lora_targets": "experts"}, ["no 'experts'"]),
    ("qwen2", {**LORA, "lora_targets": " , "}, ["names nothing"]),
    ("experts", {**LORA, "lora_targets": "mlp"}, ["no 'mlp'", "experts"]),
    ("experts", {**LORA, "lora_targets": "q_proj,gate_proj"}, ["no 'gate_proj'", "by the word experts"]),
    ("experts", {**LORA, "lora_targets": "router"}, ["no 'router'"]),
    ("qwen2", {**LORA, "freeze": "embedding"}, ["FREEZE='embedding' with LORA_RANK"]),
    ("experts", {**LORA, "train_router": "1"}, ["TRAIN_ROUTER=1 with LORA_RANK"]),
    ("qwen2", {**LORA, "optimizer_offload": True}, ["OPTIMIZER_OFFLOAD=1 with LORA_RANK"]),
    ("qwen2", {"lora_init_from": "nowhere"}, ["nowhere", "adapter_config.json"]),
    ("qwen2", {"train_router": "0"}, ["TRAIN_ROUTER=0", "no router"]),
    ("qwen2", {"freeze": "router"}, ["'router' names no weight"]),
    ("qwen2", {"freeze": "embeddings"}, ["'embeddings' names no weight", "embedding, head"]),
    ("qwen2", {"freeze": "layers 2-3"}, ["'layers 2-3'", "layers 0 to 2"]),
    ("qwen2", {"freeze": "layers 2-1"}, ["'layers 2-1' names no weight"]),
    ("qwen2", {"freeze": ","}, ["FREEZE=','", "names nothing"]),
    ("qwen2", {"freeze": "model.layers.*.self_attn.q_proj.*"}, ["linear_qkv", "k_proj"]),
    ("qwen2", {"freeze": "*gate_proj*"}, ["linear_fc1", "up_proj"]),
    ("qwen2", {"freeze": "model.layers.*.self_attn.?_proj.weight"}, ["linear_qkv.weight", "trains its bias"]),
    ("qwen2", {"freeze": "*"}, ["freezes every weight", "LORA_RANK"]),
    ("qwen2", {"freeze": "embedding,head,layers 0-2,norms"}, ["freezes every weight"]),
    ("tied", {"freeze": "head"}, ["'head' names no weight", "its head is the embedding"]),
    ("experts", {"freeze": "model.layers.*.mlp.experts.1"}, ["some experts of layer 0"]),
    ("experts", {"freeze": "router", "train_router": "1"}, ["TRAIN_ROUTER=1 and FREEZE='router'"]),
    ("experts", {"freeze": "layers 0-1", "train_router": "1"}, ["TRAIN_ROUTER=1 and FREEZE='layers 0-1'"]),
]


@pytest.mark.parametrize(("model", "settings", "named"), REFUSED, ids=[f"{m} {s}" for m, s, _ in REFUSED])
def test_settings_without_effect_or_sense_are_refused(model: str, settings: dict[str, Any], named: list[str]) -> None:
    message = refusal(model, **settings)
    assert all(each in message for each in named), message


@pytest.mark.parametrize(
    ("model", "settings", "pattern_of_names", "count"),
    [
        ("qwen2", {"freeze": "embedding"}, "embedding.word_embeddings.weight", 1),
        ("qwen2", {"freeze": "head"}, "output_layer.weight", 1),
        ("qwen2", {"freeze": "norms"}, "norm", 7),
        ("qwen2", {"freeze": "attention"}, "linear_qkv.|linear_proj.", 9),
        ("qwen2", {"freeze": "mlp"}, "linear_fc1.weight|linear_fc2.weight", 6),
        ("qwen2", {"freeze": "layers 1"}, "layers.1.", 7),
        ("qwen2", {"freeze": "layers 0-1"}, "layers.0.|layers.1.", 14),
        ("qwen2", {"freeze": "model.layers.2"}, "layers.2.", 7),
        ("qwen2", {"freeze": "model.layers.?.mlp.down_proj.weight"}, "linear_fc2", 3),
        ("tied", {"freeze": "embedding"}, "embedding", 1),
        ("experts", {"freeze": "experts"}, "experts", 24),
        ("experts", {"train_router": "0"}, "router", 3),
        ("experts", {"freeze": "router,norms"}, "router|norm", 16),
    ],
)
def test_freeze_names_weights(model: str, settings: dict[str, Any], pattern_of_names: str, count: int) -> None:
    trained = part(model, **settings)
    words = pattern_of_names.split("|")
    assert len(trained.frozen) == count and all(any(word in name for word in words) for name in trained.frozen)
    shape = architecture(model)
    assert not trained.everything and num_trained(shape, trained) < num_trained(shape, Trained())
    assert all(trained.trains(entry.megatron) != (entry.megatron in trained.frozen) for entry in weight_entries(shape))
    assert ("the head among them" in describe(shape, trained)) == (model == "tied")


def test_the_plan_says_what_is_trained_and_hints_at_a_learning_rate_of_the_other_kind() -> None:
    options = TrainOptions(Path("load"), Path("data"), Path("save"))
    shape, lora = architecture("experts"), part("experts", lora_rank=4, lora_scaling="rslora", lora_dropout=0.1)
    line = describe(shape, lora)
    assert "rank 4" in line and "root of the rank" in line and "dropout 0.1" in line and "not the experts" in line
    assert "not the experts" not in describe(shape, part("experts", lora_rank=4, lora_targets="all,experts"))
    for rate, trained, hinted in ((1e-5, lora, True), (1e-4, lora, False), (1e-5, Trained(), False), (2e-4, Trained(), True)):
        settings = TrainOptions(options.load, options.data_path, options.save, lr=rate)
        assert bool(lr_hint(settings, trained)) == hinted


def saved(model: str = "qwen2", **settings: Any) -> Checkpoint:
    """A checkpoint of a run with these settings, as far as its manifest goes."""
    options = options_record(TrainOptions(Path("load"), Path("data"), Path("save"), **settings))
    manifest: dict[str, Any] = {"training": {"options": options}}
    if lora := part(model, **settings).lora:
        manifest["adapter"] = {**vars(lora), "targets": list(lora.targets), "base": {"path": "base", "checksum": "0"}}
    return Checkpoint(Path("run/iter_0000003"), 3, TORCH_DIST, manifest)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"freeze": ""}),
        ({"freeze": "layers 0-2"}, {"freeze": "layers 0,layers 1,layers 2"}),
        (LORA, {**LORA, "lora_alpha": 8.0, "lora_dropout": 0.5, "lora_plus": 2.0}),
        ({**LORA, "lora_targets": "q_proj,v_proj"}, {**LORA, "lora_targets": "v_proj q_proj"}),
    ],
)
def test_a_resumed_run_may_say_the_same_in_other_words(before: dict[str, Any], now: dict[str, Any]) -> None:
    check_same_training(saved(**before), part(**now), architecture("qwen2"))


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        (LORA, {"lora_rank": 8, "lora_alpha": 8.0}, "LORA_RANK was 4 in run/iter_0000003 and is 8 now"),
        (LORA, {**LORA, "lora_alpha": 16.0}, "LORA_ALPHA was 8 in run/iter_0000003 and is 16 now"),
        (LORA, {**LORA, "lora_scaling": "rslora"}, "LORA_SCALING was alpha/r in run/iter_0000003 and is rslora now"),
        (
            {**LORA, "lora_targets": "attention"},
            {**LORA, "lora_targets": "q_proj"},
            "LORA_TARGETS was k_proj,o_proj,q_proj,v_proj in run/iter_0000003 and is q_proj now",
        ),
        (LORA, {}, "LORA_RANK was 4 in run/iter_0000003 and is 0 now"),
        ({}, LORA, "LORA_RANK was 0 in run/iter_0000003 and is 4 now"),
        (
            {"freeze": "embedding"},
            {},
            "embedding.word_embeddings.weight (FREEZE, TRAIN_ROUTER) was frozen in run/iter_0000003 and is trained now",
        ),
        (
            {"freeze": "embedding"},
            {"freeze": "embedding,head"},
            "output_layer.weight (FREEZE, TRAIN_ROUTER) was trained in run/iter_0000003 and is frozen now",
        ),
    ],
)
def test_a_resumed_run_trains_the_same_or_is_refused(before: dict[str, Any], now: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        check_same_training(saved(**before), part(**now), architecture("qwen2"))
    assert str(error.value).startswith(named) and "OUTPUT_PATH" in str(error.value)


def test_experts_and_the_router_are_compared_too() -> None:
    shape = architecture("experts")
    with pytest.raises(UserError, match=r"LORA_TARGETS was .*,experts in"):
        check_same_training(
            saved("experts", **LORA, lora_targets="all,experts"), part("experts", **LORA, lora_targets="attention"), shape
        )
    with pytest.raises(UserError, match=r"router.weight \(FREEZE, TRAIN_ROUTER\) was frozen"):
        check_same_training(saved("experts", train_router="0"), part("experts"), shape)


def test_an_adapter_to_continue_gives_rank_scale_and_targets(tmp_path: Path) -> None:
    model = tiny.save_qwen2(tmp_path / "model", tied=False)
    config = {"rank": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    folder = str(peft_oracle.save_adapter(model, tmp_path / "adapter", **config))
    options = {"load": Path("load"), "data_path": Path("data"), "save": Path("save"), "lora_init_from": folder}
    shape = read_architecture(Qwen2Config.from_pretrained(model).to_dict(), "config.json")

    def continued(saved: LoRA | None = None, **settings: Any) -> LoRA | None:
        return trained_part(TrainOptions(**{**options, **settings}), shape, saved).lora

    found = LoRA(3, 7.0, ("q_proj", "v_proj"), rslora=True)
    assert continued() == found
    stated = {"lora_rank": 3, "lora_alpha": 7.0, "lora_targets": "q_proj,v_proj", "lora_scaling": "rslora"}
    assert continued(**stated) == found
    for setting, value in (("lora_rank", 4), ("lora_alpha", 6.0), ("lora_targets", "attention")):
        with pytest.raises(UserError, match=f"{setting.upper()} is .* has"):
            continued(**{setting: value})
    # A run that is resumed does not read the folder again.
    assert continued(found, lora_init_from="gone") == found
