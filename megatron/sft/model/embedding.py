"""The embedding of token ids, whose gradient touches only the rows of the ids that occur."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron.sft.model.fused_wgrad import added_gradient


class TokenEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding, with its gradient added to `main_grad` row by row instead of as a whole matrix."""

    def forward(self, input_: Tensor) -> Tensor:
        """ids [batch, t] to [batch, t, hidden], or with sequence parallelism [t / TP, batch, hidden]."""
        if not (hasattr(self.weight, "main_grad") and torch.is_grad_enabled()):
            whole: Tensor = super().forward(input_)
            return whole
        local = input_ - self.vocab_start_index
        local = local.masked_fill((local < 0) | (local >= self.weight.shape[0]), -1)
        vectors: Tensor = _Lookup.apply(self.weight, local, self.tp_group.size() > 1)
        if self.reduce_scatter_embeddings:
            vectors = vectors.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(vectors, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(vectors, group=self.tp_group)


class _Lookup(torch.autograd.Function):
    """Rows of weight by ids [batch, t], zeros where an id is -1: another rank has its row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, split: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        vectors = F.embedding(ids.clamp(min=0), weight)
        return vectors.masked_fill_((ids < 0)[..., None], 0.0) if split else vectors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        weight: Any = ctx.weight
        rows, ids, total = gradients[0].flatten(0, 1).contiguous(), ids.flatten(), weight.main_grad
        if rows.is_cuda:
            from megatron.sft.model.kernels.layer import add_rows

            add_rows(total, rows, ids)
        else:
            total.index_add_(0, ids[ids >= 0], rows[ids >= 0].to(total.dtype))
        return added_gradient(weight), None, None
