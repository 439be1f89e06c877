"""What processes tell each other of a save, without waiting for each other and without the network of the GPUs."""

import torch
from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store


class Exchange:
    """Notes by name, seen by all processes, of the save with this `number`. Each thread needs one of its own."""

    def __init__(self, number: int) -> None:
        self._store: Store = PrefixStore(f"checkpoint/{number}", _own_connection(_get_default_store()))

    def put(self, name: str, text: str) -> None:
        """Leave a note; on return every process can see it."""
        self._store.set(name, text)
        # The answer to a second question says that the first was heard.
        self._store.check([name])

    def get(self, name: str) -> str | None:
        """The note, or None if it is not there yet."""
        if not self._store.check([name]):
            return None
        return bytes(self._store.get(name)).decode()


def _own_connection(store: Store) -> Store:
    """The store that the processes met in, over another connection: one that waits holds up whoever shares it."""
    if torch.distributed.get_world_size() == 1:
        return store
    if hasattr(store, "clone"):
        return store.clone()
    prefixes = []
    while isinstance(store, PrefixStore):
        # The name is not to be had in this version of torch; what is below it is the same for all processes.
        store = store.underlying_store
        prefixes.append("_")
    assert isinstance(store, TCPStore)
    return PrefixStore("/".join(["own", *prefixes]), TCPStore(store.host, store.port, is_master=False))
