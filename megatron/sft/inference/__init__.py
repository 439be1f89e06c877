"""Answers of an exported model and what they are worth: chat, exact match, lm-eval tasks, tables of scores.

Knows Hugging Face folders and chat templates, nothing of Megatron.
"""
