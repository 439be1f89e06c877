"""Megatron checkpoints on disk: the folder, the two formats, safe reading, and writing behind a running step.

Nothing that a checkpoint holds is ever run.
"""
