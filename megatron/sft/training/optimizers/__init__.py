"""The optimizers of this project: in place in 16 or 8 bits, and with states in CPU memory."""
