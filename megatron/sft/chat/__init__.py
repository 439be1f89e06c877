"""From one record to one conversation of tokens of which it is proven which are trained.

Knows messages, chat templates and tokenizers; nothing of files and rows.
"""
