"""Triton kernels of the decoder layer and of the loss; the torch code next to their callers says what they compute."""
