"""Model families as data, one file each: what config.json may say, and where weights have other names than Llama's.

A file imports nothing of this project; `families/registry.py` says which names it may define.
"""
