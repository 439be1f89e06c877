"""Exported models tried out: chat, exact match on data files, lm-eval tasks, tables of scores.

Knows Hugging Face folders and chat templates, nothing of Megatron.
"""
