"""What every token goes through next to its experts: an MLP, which tensor parallelism splits like a dense one."""

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron.sft.families.architecture import MoEConfig
from megatron.sft.model.swiglu import gated_mlp


class SharedExperts(MLP):
    """Gate and up projection, SwiGLU and down projection, times the sigmoid of a projection to one number where there is one.

    gate_weight: [1, hidden size].
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig, linear: tuple[type, type]) -> None:
        """linear: the classes of the column- and the row-parallel layer."""
        submodules = MLPSubmodules(linear_fc1=linear[0], linear_fc2=linear[1])
        group = parallel_state.get_tensor_model_parallel_group()
        # megatron-core's MLP takes the width of its second layer from the configuration.
        of_width = copy.copy(config)
        of_width.ffn_hidden_size = moe.shared_width
        super().__init__(of_width, submodules, ffn_hidden_size=moe.shared_width, tp_group=group)
        self.gate_weight: nn.Parameter | None = None
        if moe.shared_gate:
            weight: Any = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
            # As the router's: each tensor-parallel rank has a part of the tokens.
            weight.sequence_parallel = config.sequence_parallel
            self.gate_weight = weight

    def forward(self, hidden: Tensor, again: bool) -> Tensor:
        """[t / TP with sequence parallelism, 1, hidden size] to the same. again: activations are recomputed."""
        output, _ = gated_mlp(self, hidden, "silu", again)
        if self.gate_weight is None:
            return output
        return output * nn.functional.linear(hidden, self.gate_weight).sigmoid()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core's description of the linear layers, and the gate, which is whole on every rank."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        described = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.gate_weight is None:
            return described
        gate, groups = {"gate_weight": self.gate_weight}, {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return {**described, **make_sharded_tensors_for_checkpoint(gate, prefix, {}, sharded_offsets, **groups)}
