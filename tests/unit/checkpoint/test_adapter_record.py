"""What names the weights under adapters: the same for every conversion of one model, another for every other model."""

from pathlib import Path
from typing import Any

from megatron.sft.checkpoint.adapter_record import base_checksum
from megatron.sft.checkpoint.folder import TORCH_DIST, Checkpoint

SOURCE = {"weights_fingerprint": "a", "config": {"vocab_size": 131}}
FILES = {"__0_0.distcp": {"bytes": 1, "sha256": "1"}}


def checksum(**manifest: Any) -> str:
    return base_checksum(Checkpoint(Path("iter_0000001"), 1, TORCH_DIST, {"hf_dtype": "bfloat16", "files": FILES, **manifest}))


def test_a_conversion_is_named_by_its_model_and_what_was_changed_of_it() -> None:
    plain = checksum(source=SOURCE)
    other_files = {"__0_0.distcp": {"bytes": 1, "sha256": "2"}}
    assert checksum(source={**SOURCE, "path": "elsewhere"}, files=other_files) == plain
    changed = [
        checksum(source={**SOURCE, "weights_fingerprint": "b"}),
        checksum(source=SOURCE, hf_dtype="float32"),
        checksum(source={**SOURCE, "config": {"vocab_size": 132}}),
        checksum(source={**SOURCE, "rope_extension": {"kind": "yarn", "factor": 4.0}}),
    ]
    assert len({plain, *changed}) == 5


def test_a_run_is_named_by_its_files() -> None:
    trained, other_files = checksum(source=SOURCE, training={}), {"__0_0.distcp": {"bytes": 1, "sha256": "2"}}
    assert trained != checksum(source=SOURCE)
    assert trained != checksum(source=SOURCE, training={}, files=other_files)
    assert trained == checksum(source={**SOURCE, "weights_fingerprint": "b"}, training={})
