"""Triton kernels of the decoder layer, the loss and AdamW; the torch code next to their callers says what they compute.

Only imported where there is a GPU.
"""
