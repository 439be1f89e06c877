"""Model families as tables: what config.json may say, and which Megatron weight holds which Hugging Face tensors.

A family is one file of a few lines; no family knows another.
"""
