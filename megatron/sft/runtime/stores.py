"""Connections to torch's TCPStore, at which the processes of a run meet; some builds of torch have no libuv, its default."""

import os
from datetime import timedelta
from typing import Any

# torch's own variable, which its init_process_group reads as well.
_USE_LIBUV = "USE_LIBUV"


def connect(address: str, port: int, seconds: float = 300.0) -> Any:
    """A new connection to the store of another process. Raises RuntimeError if there is none within `seconds`."""
    from torch.distributed import TCPStore

    use_libuv = os.environ.get(_USE_LIBUV, "1") == "1"
    timeout = timedelta(seconds=seconds)
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout, use_libuv=use_libuv)


def do_without_libuv() -> None:
    """Where torch was built without libuv (Debian's is), or USE_LIBUV=0 says so, let torchrun and its processes do without.

    For the launcher: its processes inherit the variable, which torchrun's own store does not read.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend

    if os.environ.get(_USE_LIBUV, "1") == "1":
        try:
            TCPStore("localhost", 0, is_master=True, wait_for_workers=False, use_libuv=True)
        except (RuntimeError, ValueError) as error:
            if "libuv" not in str(error):
                return
        else:
            return
        os.environ[_USE_LIBUV] = "0"
    backend: Any = c10d_rendezvous_backend
    backend.TCPStore = lambda *arguments, **named: TCPStore(*arguments, **{**named, "use_libuv": False})
