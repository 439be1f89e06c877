"""Supervised fine-tuning of Hugging Face models with megatron-core's parallelism.

`megatron` is a namespace package shared with megatron-core: there must never be a `megatron/__init__.py`.
"""

import warnings

__version__ = "0.2.0"

# What megatron-core says, when it is imported, of packages that are not used here.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
