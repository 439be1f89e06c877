"""Builds the model: the one place that knows megatron-core's GPTModel and how its layers are put together here."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.sft.families.architecture import Architecture
from megatron.sft.families.rope import inverse_frequencies
from megatron.sft.families.trained import Trained
from megatron.sft.model.adapters import add_adapters, freeze
from megatron.sft.model.attention import PackedAttention
from megatron.sft.model.config import has_transformer_engine
from megatron.sft.model.cross_entropy import weighted_cross_entropy
from megatron.sft.model.decoder_layer import DecoderLayer
from megatron.sft.model.experts.sparse_mlp import SparseMLP
from megatron.sft.model.inputs import MicroBatch
from megatron.sft.model.layout import Layout
from megatron.sft.model.norm import ResidualNorm, RMSNorm
from megatron.sft.model.rotary import rotary_tables
from megatron.sft.runtime import device

# The summed loss whose gradient is taken, every trained token's -log p, and the report of `MicroBatch.weigh` if there is one.
HeadResult = tuple[Tensor, Tensor, Tensor | None]


class OutputHead(tensor_parallel.ColumnParallelLinear):
    """The output layer, computing the loss instead of all logits.

    It stays a separate module because megatron-core waits for a module's gathered parameters when the module is called.
    """

    def forward(self, hidden: Tensor, weight: Tensor, batch: MicroBatch, vocab_size: int, logits: bool) -> Tensor | HeadResult:
        """hidden: [t / TP with sequence parallelism, 1, hidden size]. Returns what `SFTModel.forward` does."""
        if self.sequence_parallel:
            # Each rank's head gives a part of the gradient; the gather's backward sums the parts and scatters.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.squeeze(1)  # [t, hidden]
        if logits:
            local = hidden @ weight.t()
            whole: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(local, group=self.tp_group)
            return whole[:, :vocab_size]
        trained = hidden.index_select(0, batch.targets.hidden_indices)  # [n, hidden]
        shared_here = self.weight is None  # tied, and the embedding lies on this stage
        # What the backward pass will start with: the weight's gradient is made before.
        scale = batch.gradient_scale
        if self.config.fp16 and torch.is_grad_enabled():
            scale = self.config.grad_scale_func(torch.ones((), device=hidden.device) if scale is None else scale)
        targets, report = batch.targets, None
        if batch.weigh is not None:
            with torch.no_grad():
                weighted, losses = weighted_cross_entropy(trained, weight, targets, vocab_size, self.tp_group)
            weights, report = batch.weigh(losses)
            if not torch.is_grad_enabled():
                return weighted, losses, report
            targets = replace(targets, weights=weights)
        result = weighted_cross_entropy(trained, weight, targets, vocab_size, self.tp_group, shared_here, scale)
        return *result, report


class SFTModel(GPTModel):
    """A GPTModel that takes a `MicroBatch` and returns the summed loss of its trained tokens (on the last stage)."""

    def __init__(self, *args: Any, architecture: Architecture, **kwargs: Any) -> None:
        # megatron-core's own rotary positions know Llama 3.1's scaling at its first values only.
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.true_vocab_size = architecture.vocab_size
        # No buffer: Float16Module would round it.
        self.inverse_frequencies = inverse_frequencies(architecture, device.current())
        # Set where the embedding is frozen: recomputation and the stage before ask for a gradient of what has none yet.
        self.starts_gradient = False
        if self.post_process:
            # GPTModel makes its output layer itself; only what it computes is changed.
            self.output_layer.__class__ = OutputHead

    def forward(self, batch: MicroBatch, logits: bool = False) -> Tensor | HeadResult:
        """On the last pipeline stage the `HeadResult`, on the others hidden states [t, 1, hidden].

        logits=True gives [t, vocabulary] instead of the loss, gathered over TP and without padded rows, for comparisons.
        """
        hidden: Tensor = super().forward(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed)
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        result: Tensor | HeadResult = self.output_layer(hidden, weight, batch, self.true_vocab_size, logits)
        return result

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.starts_gradient and self.pre_process and self.training and torch.is_grad_enabled():
            decoder_input.requires_grad_()
        return decoder_input, rotary_tables(position_ids[0], self.inverse_frequencies), *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # GPTModel would form all logits here; the head takes the hidden states.
        return hidden_states


def build_model(
    architecture: Architecture, layout: Layout, config: TransformerConfig, chunk: int = 0, trained: Trained | None = None
) -> SFTModel:
    """This process's part of the model, its parameters not yet set: load a checkpoint into it.

    chunk: which one, where the layout puts several on each pipeline stage. trained: with its adapters, and without gradients
    for what is frozen; everything unless given. Needs megatron-core's parallel state to have the sizes of `layout`. Under
    `torch.device("meta")` it takes no memory.
    """
    vp_stage = chunk if layout.virtual_pipeline > 1 else None
    pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    model = SFTModel(
        config=config,
        transformer_layer_spec=_layers(config, vp_stage),
        vocab_size=layout.padded_vocab_size(architecture),
        max_sequence_length=architecture.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        vp_stage=vp_stage,
        architecture=architecture,
    )
    _mark_split_parameters(model)
    if trained is not None and trained.lora is not None:
        add_adapters(model, architecture, layout, trained.lora)
    elif trained is not None:
        freeze(model, architecture, layout, trained)
    if pre_process and not model.embedding.word_embeddings.weight.requires_grad:
        model.starts_gradient = config.recompute_granularity == "full" or layout.pipeline_parallel > 1
    for module in model.modules():
        # Transformer Engine's layers add their weight gradients to main_grad inside the GEMM. megatron-core's switch for it
        # would ask for Apex, which only its own layers need.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = all(weight.requires_grad for weight in module.parameters(recurse=False))
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return model if on_meta else model.to(device.current())


def _mark_split_parameters(model: torch.nn.Module) -> None:
    """Mark the parameters that TP splits, which megatron-core's own layers do only when they initialise their weights.

    Without the marks the gradient norm would count the first TP rank's part alone.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dimension = 0
        elif isinstance(module, RowParallelLinear):
            dimension = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)


def _layers(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    layer.module = DecoderLayer
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = ResidualNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm if config.qk_layernorm else None
    if has_transformer_engine():
        from megatron.core.extensions import transformer_engine as engine

        attention.linear_qkv, attention.linear_proj = engine.TEColumnParallelLinear, engine.TERowParallelLinear
        windowed_part = config.context_parallel_size > 1 and config.window_size is not None
        if config.params_dtype != torch.float32 and not windowed_part:
            # It has no packed attention in float32, nor a window on a part of the row.
            attention.core_attention = engine.TEDotProductAttention
        if not config.num_moe_experts:
            dense = layer.submodules.mlp.submodules
            dense.linear_fc1, dense.linear_fc2 = engine.TEColumnParallelLinear, engine.TERowParallelLinear
    if config.num_moe_experts:
        # The name that Transformer Engine's layer gives it: before experts the norm is not part of a linear layer.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        layer.submodules.mlp = SparseMLP
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)
