"""Supervised fine-tuning of Hugging Face models with megatron-core's parallelism.

`megatron` is a namespace package shared with megatron-core: there must never be a `megatron/__init__.py`.
"""

import importlib.util
import logging
import sys
import warnings
from types import SimpleNamespace

__version__ = "0.2.0"

# megatron-core says so when it is imported, which `device.prepare` may come after.
warnings.filterwarnings("ignore", message="Transformer Engine and|.*Apex is not|MimoModelConfig is experimental")
# Of torch's build with CUDA on a machine with nvcc and without a GPU, in every process.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime is found" not in record.getMessage())

if importlib.util.find_spec("triton") is None:
    # megatron-core 0.19 imports Triton for these kernels, which are not used here; torch's CPU build does not have it.
    _absent = SimpleNamespace(GLOBAL_BLOCK_SIZE=0, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
    sys.modules.setdefault("megatron.core.transformer.moe.ops.paged_stash", _absent)  # type: ignore[arg-type]
