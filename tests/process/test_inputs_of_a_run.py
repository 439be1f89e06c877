"""The launcher checks a run's inputs once for all processes of a node."""

from pathlib import Path

import pytest

from megatron.sft.data.tokenized import data_file
from tests.support import tiny
from tests.support.copied_material import copy_of_data


@pytest.fixture
def data(packed_rows: Path, tmp_path: Path) -> Path:
    """A copy of the packed rows to damage, old enough to be remembered."""
    return copy_of_data(packed_rows, tmp_path / "data")


def test_all_processes_of_a_node_end_with_one_line_and_one_of_them_reads(converted: Path, data: Path, tmp_path: Path) -> None:
    content = bytearray(data_file(data, "bin").read_bytes())
    content[77] ^= 8
    data_file(data, "bin").write_bytes(content)
    output = tiny.launch(
        *(2, "train", "train", "--load", converted, "--data-path", data, "--save", tmp_path / "out"),
        *("--precision", "fp32", "--train-iters", "1", "--global-batch-size", "8", "--micro-batch-size", "2"),
        status=2,
    )
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "packed.v1.bin is damaged" in errors[0], output
    assert "iteration 1" not in output
