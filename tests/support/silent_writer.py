"""megatron.sft.train with a checkpoint writer that ends without a word on the last process."""

import os

from megatron.sft import train


def main() -> None:
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        from megatron.sft.checkpoint.background import Job

        Job._run = lambda self: None  # type: ignore[method-assign]
    train._end()


if __name__ == "__main__":
    main()
