"""Says how far a file has been read: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Progress through a file of `num_bytes`, on stderr."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_rows = 0
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenising", leave=False)

    def update(self, num_rows: int, num_bytes_read: int) -> None:
        self.num_rows += num_rows
        now = time.monotonic()
        rows_per_second = self.num_rows / max(now - self.started, 1e-9)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{rows_per_second:,.0f} rows/s", refresh=False)
            self.bar.update(num_bytes_read - self.bar.n)
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            share = num_bytes_read / self.num_bytes
            seconds_left = (now - self.started) * (1 - share) / share
            print(
                f"tokenised {self.num_rows:,} rows ({100 * share:.0f} % of the file), {rows_per_second:,.0f} rows/s, "
                f"about {seconds_left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
