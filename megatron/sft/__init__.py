"""Supervised fine-tuning of Hugging Face models with megatron-core's parallelism.

`megatron` is a namespace package shared with megatron-core: there must never be a `megatron/__init__.py`.
"""

__version__ = "0.2.0"
