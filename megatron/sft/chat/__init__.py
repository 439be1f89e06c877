"""From one record to the tokens of one conversation, and the proof of which of them are trained.

The path: conversations (fields, turns) reads a record, template renders it and proves its mask with skeleton and
skeleton_builder, encoding makes tokens. Knows messages, chat templates and tokenizers; nothing of files and rows.
"""
