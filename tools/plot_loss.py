"""Draws the loss curve of one run or several.

python tools/plot_loss.py outputs/checkpoints/RUN [RUN...] [--output loss.png]
"""

from megatron.sft.errors import run
from megatron.sft.plot import main

if __name__ == "__main__":
    run(main)
