"""What a process group of one process leaves behind."""

import os

import pytest

from megatron.sft.runtime import device


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_alone_leaves_no_ranks_in_the_environment(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setenv("MASTER_ADDR", "of a pod")
    monkeypatch.delenv("RANK", raising=False)
    before = ranks()
    try:
        with device.process_group():
            assert dist.get_world_size() == 1 and os.environ["RANK"] == "0"
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert not dist.is_initialized()
    assert ranks() == before


def ranks() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
