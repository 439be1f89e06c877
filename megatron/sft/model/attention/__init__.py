"""Attention over packed rows, without Transformer Engine: its kernels, and multi-head latent attention."""
