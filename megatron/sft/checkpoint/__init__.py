"""Megatron checkpoints: the folder that holds them, and the two formats of what lies in it."""
