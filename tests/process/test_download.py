"""Downloads of models and data sets, against a small hub on this machine, from folders, and without any network."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.support import tiny
from tests.support.hub_server import COMMIT, Hub, HubRepository

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 8192
CLOSED = "http://127.0.0.1:9"


def parquet(columns: dict[str, list[str]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    model = {
        "config.json": b'{"torch_dtype": "bfloat16"}',
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"the same weights",
        "original/consolidated.00.pth": b"the same weights",
        "tokenizer.json": b"{}",
    }
    rows = '{"instruction": "é", "output": "日本"}\n{"instruction": "2", "output": "3", "messages": [{"role": "user"}]}\n'
    configs = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in ("easy", "hard")
    )
    problems = parquet({"problem": ["1+1"], "solution": ["2"]})
    repositories = {
        "models/org-a/Model-1.5B": HubRepository(model),
        "models/org/gated": HubRepository({"config.json": b"{}"}, token="right", gated=True),
        "models/org/private": HubRepository({"config.json": b"{}"}, token="right"),
        "datasets/org-a/Chat-1M": HubRepository({"train.json": rows.encode(), "test.jsonl": b'{"instruction": "t"}\n'}),
        "datasets/org/levels": HubRepository(
            {
                "README.md": (configs + "---\n").encode(),
                "easy/train-00000-of-00001.parquet": problems,
                "hard/train-00000-of-00001.parquet": problems,
            }
        ),
    }
    with Hub(repositories) as server:
        yield server


class Download:
    """Runs the module in a separate process with its own home and assets."""

    def __init__(self, folder: Path) -> None:
        self.assets = folder / "assets"
        self.folder = folder

    def __call__(self, *arguments: str, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(self.folder / "home")} | environment
        kind, *others = arguments
        return subprocess.run(
            [sys.executable, "-m", "megatron.sft.download", kind, "--assets-dir", str(self.assets), *others],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def files(self, *parts: str) -> dict[str, bytes]:
        """Everything below a folder of assets but the record."""
        folder = self.assets.joinpath(*parts)
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".download.json"]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def download(tmp_path: Path) -> Download:
    return Download(tmp_path)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refused download."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_model_arrives_bit_equal_and_without_leftovers(download: Download, hub: Hub) -> None:
    result = download("model", "org-a/Model-1.5B", endpoint=hub.address)
    assert result.returncode == 0, result.stderr
    files = hub.repositories["models/org-a/Model-1.5B"].files
    wanted = ("config.json", "model.safetensors", "tokenizer.json")
    assert download.files("checkpoints") == {f"org_a_Model_1.5B/{name}": files[name] for name in wanted}
    assert result.stdout.splitlines()[-1].startswith("next: bash scripts/2_convert.sh ")
    assert "2 files" in result.stdout  # what was skipped
    record = json.loads((download.assets / "checkpoints/org_a_Model_1.5B/.download.json").read_text())
    assert (record["source"], record["revision"], record["commit"]) == ("org-a/Model-1.5B", "main", COMMIT)


def test_weights_that_change_on_the_way_or_afterwards_are_found(
    download: Download, hub: Hub, tiny_qwen2: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_qwen2.iterdir()}
    repository = HubRepository(files)
    hub.repositories["models/org-a/Checked"] = repository
    repository.forged["model.safetensors"] = files["model.safetensors"][:-1] + b"!"
    refused = refusal(download("model", "org-a/Checked", endpoint=hub.address))
    assert "model.safetensors is damaged (its checksum differs" in refused
    assert "run the same command again" in refused
    repository.forged.clear()
    assert download("model", "org-a/Checked", endpoint=hub.address).returncode == 0
    weights = download.assets / "checkpoints" / "org_a_Checked" / "model.safetensors"
    tiny.run_module("convert", "--source", weights.parent, "--output", tmp_path / "good")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 16  # a weight a little different
    weights.write_bytes(content)
    said = tiny.run_module("convert", "--source", weights.parent, "--output", tmp_path / "bad", status=2)
    assert f"{weights} is damaged (its checksum differs" in said
    assert not (tmp_path / "bad").exists()


def test_what_is_there_is_used_as_it_is_without_any_network(download: Download, hub: Hub) -> None:
    download("model", "org-a/Model-1.5B", endpoint=hub.address)
    edited = download.assets / "checkpoints/org_a_Model_1.5B/tokenizer.json"
    edited.write_text('{"edited": true}')
    result = download("model", "org-a/Model-1.5B", endpoint=CLOSED)
    assert result.returncode == 0, result.stderr
    assert "there already" in result.stdout
    assert edited.read_text() == '{"edited": true}'
    assert "revision main, not v2" in refusal(download("model", "org-a/Model-1.5B", "--revision", "v2", endpoint=CLOSED))


def test_a_transfer_that_breaks_continues_where_it_was(download: Download, hub: Hub) -> None:
    hub.repositories["models/org-a/Model-1.5B"].broken["model.safetensors"] = 1
    result = download("model", "org-a/Model-1.5B", endpoint=hub.address)
    assert result.returncode == 0, result.stderr
    assert download.files("checkpoints")["org_a_Model_1.5B/model.safetensors"] == WEIGHTS


def test_a_download_that_died_is_finished_by_the_next_try_without_fetching_again(download: Download, hub: Hub) -> None:
    repository = hub.repositories["models/org-a/Model-1.5B"]
    weights = f"org-a/Model-1.5B/resolve/{COMMIT}/model.safetensors"
    missing = repository.files.pop("tokenizer.json")
    download("model", "org-a/Model-1.5B", endpoint=hub.address)
    # What a process that was killed before its last file leaves behind.
    folder = download.assets / "checkpoints"
    (folder / "org_a_Model_1.5B/.download.json").unlink()
    (folder / "org_a_Model_1.5B").rename(folder / f".org_a_Model_1.5B.{COMMIT[:12]}.incomplete")
    repository.files["tokenizer.json"] = missing
    fetched = hub.requests["GET", weights]
    assert download("model", "org-a/Model-1.5B", endpoint=hub.address).returncode == 0
    assert set(download.files("checkpoints", "org_a_Model_1.5B")) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert fetched <= hub.requests["GET", weights] <= fetched + 1


def test_a_gated_model_says_how_to_get_access(download: Download, hub: Hub) -> None:
    for token in ({}, {"HF_TOKEN": "wrong"}):
        line = refusal(download("model", "org/gated", endpoint=hub.address, **token))
        assert "model org/gated is gated" in line
        assert "HF_TOKEN" in line
    assert not download.files("checkpoints")


def test_a_private_model_needs_the_right_token(download: Download, hub: Hub) -> None:
    line = refusal(download("model", "org/private", endpoint=hub.address))
    assert "org/private was not found" in line
    assert "HF_TOKEN" in line
    assert download("model", "org/private", endpoint=hub.address, HF_TOKEN="right").returncode == 0


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_missing_id_and_revision_are_named(download: Download, hub: Hub, kind: str) -> None:
    assert f"{kind} org/nothing was not found" in refusal(download(kind, "org/nothing", endpoint=hub.address))
    there = {"model": "org-a/Model-1.5B", "dataset": "org-a/Chat-1M"}[kind]
    line = refusal(download(kind, there, "--revision", "v9", endpoint=hub.address))
    assert f"{kind} {there} has no revision v9" in line
    assert not download.files("checkpoints")
    assert not download.files("data")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_no_network_is_said_soon_with_the_ways_out(download: Download, kind: str) -> None:
    started = time.monotonic()
    line = refusal(download(kind, "org/name", endpoint=CLOSED))
    assert time.monotonic() - started < 20
    for part in (f"{kind} org/name", CLOSED, "cannot be reached", "HF_ENDPOINT", f"1_download.sh {kind} "):
        assert part in line
    assert "HF_HUB_OFFLINE" in refusal(download(kind, "org/name", endpoint=CLOSED, HF_HUB_OFFLINE="1"))


def test_a_local_model_folder_is_copied_so_that_edits_do_not_reach_the_source(download: Download, tmp_path: Path) -> None:
    source = tmp_path / "my model-7B"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(WEIGHTS)
    result = download("model", str(source), endpoint=CLOSED)
    assert result.returncode == 0, result.stderr
    target = download.assets / "checkpoints" / "my model_7B"
    (target / "config.json").write_text('{"edited": true}')
    assert (source / "config.json").read_text() == "{}"
    assert (target / "model.safetensors").read_bytes() == WEIGHTS


def test_local_sources_that_do_not_do_are_named(download: Download, tmp_path: Path) -> None:
    assert f"{tmp_path}/none does not exist" in refusal(download("model", f"{tmp_path}/none", endpoint=CLOSED))
    assert "no config.json" in refusal(download("model", str(tmp_path), endpoint=CLOSED))
    assert "rows.json does not exist" in refusal(download("dataset", "rows.json", endpoint=CLOSED))


def test_a_data_set_becomes_json_lines_with_records_as_they_were(download: Download, hub: Hub) -> None:
    result = download("dataset", "org-a/Chat-1M", endpoint=hub.address)
    assert result.returncode == 0, result.stderr
    expected = '{"instruction":"é","output":"日本"}\n{"instruction":"2","output":"3","messages":[{"role":"user"}]}\n'
    assert download.files("data") == {"org-a-Chat-1M/org-a-Chat-1M.json": expected.encode()}
    assert "2 records, columns instruction, output, messages" in result.stdout
    again = download("dataset", "org-a/Chat-1M", endpoint=CLOSED)
    assert (again.returncode, "there already" in again.stdout) == (0, True)
    line = refusal(download("dataset", "org-a/Chat-1M", "--split", "test", endpoint=hub.address))
    assert "split train, not test" in line


def test_configuration_split_and_columns_are_chosen(download: Download, hub: Hub) -> None:
    renamed = ("--map-column", "problem=instruction", "--map-column", "solution=output")
    result = download("dataset", "org/levels", "--config", "hard", *renamed, endpoint=hub.address)
    assert result.returncode == 0, result.stderr
    assert download.files("data") == {"org-levels/org-levels.json": b'{"instruction":"1+1","output":"2"}\n'}
    easy = f"datasets/org/levels/resolve/{COMMIT}/easy/train-00000-of-00001.parquet"
    assert hub.requests["GET", easy] == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "['easy', 'hard']"),
        (("--config", "medium"), "medium"),
        (("--config", "easy", "--split", "dev"), "split dev is not in the data set, which has train"),
        (
            ("--config", "easy", "--map-column", "question=instruction"),
            "no column question to rename, it has problem, solution",
        ),
        (("--config", "easy", "--map-column", "problem=solution"), "already has a column solution"),
        (("--config", "easy", "--map-column", "problem"), "'problem' is not OLD=NEW"),
    ],
)
def test_a_wrong_choice_leaves_nothing(download: Download, hub: Hub, arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(download("dataset", "org/levels", *arguments, endpoint=hub.address))
    assert not (download.assets / "data").exists() or not list((download.assets / "data").iterdir())


def test_local_files_of_every_kind_become_the_same_tree(download: Download, tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text('[{"instruction": "a", "output": "NA"},\n {"instruction": "b", "output": "2"}]')
    (tmp_path / "table.csv").write_text("instruction,output\na,NA\nb,2\n")
    (tmp_path / "table2.parquet").write_bytes(parquet({"instruction": ["a", "b"], "output": ["NA", "2"]}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(
        '{"instruction": "a", "output": "NA"}\n{"instruction": "b", "output": "2"}\n'
    )
    for name in ("array.json", "table.csv", "table2.parquet", "folder"):
        result = download("dataset", str(tmp_path / name), endpoint=CLOSED)
        assert result.returncode == 0, result.stderr
        stem = name.partition(".")[0]
        expected = b'{"instruction":"a","output":"NA"}\n{"instruction":"b","output":"2"}\n'
        assert download.files("data", stem) == {f"{stem}.json": expected}
