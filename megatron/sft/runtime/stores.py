"""torch's TCPStore, at which the processes of a run meet: some builds of torch have no libuv, for which it asks by default."""

import os
from datetime import timedelta
from functools import cache
from typing import Any

# Not a part of torch: the watchdog's thread comes here while the main thread may still be importing torch. An import of torch
# waits for that, one of its parts does not.
import torch

TCPStore = torch.distributed.TCPStore
# torch's own variable. It reads it in some of the places that make a store.
_USE_LIBUV = "USE_LIBUV"


def connect(address: str, port: int, seconds: float = 300.0) -> TCPStore:
    """A new connection to the store of another process. Raises RuntimeError if there is none within `seconds`."""
    prepare()
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def check_libuv() -> None:
    """For the launcher: where torch was built without libuv (Debian's is), USE_LIBUV=0 is set for it and its processes."""
    if os.environ.get(_USE_LIBUV, "1") == "1":
        try:
            TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            if "libuv" in str(error):
                os.environ[_USE_LIBUV] = "0"
    prepare()


@cache
def prepare() -> None:
    """Make this process's stores without libuv if USE_LIBUV=0 says so, torchrun's and torch's own included."""
    if os.environ.get(_USE_LIBUV, "1") == "1":
        return
    original = TCPStore.__init__

    def initialize(store: TCPStore, *arguments: Any, **named: Any) -> None:
        original(store, *arguments, **{**named, "use_libuv": False})

    TCPStore.__init__ = initialize  # type: ignore[assignment, method-assign]
