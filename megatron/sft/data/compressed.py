"""Opens files as they are or compressed (.gz, .zst), which their first bytes show."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron.sft.runtime.errors import UserError

GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ZSTANDARD_BYTES = 1 << 14  # packed bytes read at a time: they may unpack to a thousand times as many
BUFFER_BYTES = 1 << 20


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The unpacked content of a file, and the file itself, whose position says how much has been read.

    A `UserError` where a compressed file is cut short or damaged.
    """
    with open(path, "rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        try:
            if start.startswith(GZIP):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
            elif start.startswith(ZSTANDARD):
                yield cast(BinaryIO, io.BufferedReader(_ZstandardStream(raw), BUFFER_BYTES)), raw
            else:
                yield raw, raw
        except EOFError:
            raise UserError(f"data file {path} ends too early, it is cut short: get it again") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"data file {path} is damaged ({error}): get it again") from None


class _ZstandardStream(io.RawIOBase):
    """The unpacked content of a .zst file of one or more frames.

    EOFError where the file ends within a frame, which zstandard's own `stream_reader` passes over in silence.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self.raw = raw
        self.library = zstandard
        self.frame = self._new_frame()
        self.unread = b""  # unpacked bytes

    def _new_frame(self) -> Any:
        # Files packed with `zstd --long=31` need the largest window.
        return self.library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.unread:
            packed = self.frame.unused_data or self.raw.read(ZSTANDARD_BYTES)
            if not packed:
                if self.frame.eof:
                    return 0
                raise EOFError
            if self.frame.eof:
                self.frame = self._new_frame()
            try:
                self.unread = self.frame.decompress(packed)
            except self.library.ZstdError as error:
                raise zlib.error(str(error)) from None
        size = min(len(buffer), len(self.unread))
        buffer[:size], self.unread = self.unread[:size], self.unread[size:]
        return size
