"""Writing, re-sharding and exporting: a model between Hugging Face's folder and Megatron's checkpoint.

Imports from every room below `inference`; only commands import it.
"""
