"""Several inputs in one run: which records are taken, and what is reported of them."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from megatron.sft import tokenize
from megatron.sft.data.mixture import Input, parse_inputs, validated_source
from megatron.sft.runtime.errors import UserError
from tests.support.material import smollm2_folder


def write(path: Path, num_rows: int, name: str = "row") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"{name} {index}", "output": f"answer {index}"} for index in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def taken(text: str, seed: int = 1, number: int = 0) -> list[str]:
    (given,) = parse_inputs([text])
    return [row.fields["instruction"] for row in validated_source(given).records(seed, number)]


def test_a_count_or_a_share_is_sampled_without_replacement_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 1000)
    assert len(taken(str(path))) == 1000
    for text, count in ((f"{path}#300", 300), (f"{path}#30%", 300), (f"{path}#0.25%", 3), (f"{path}#1000", 1000)):
        rows = taken(text)
        assert len(rows) == count == len(set(rows))
        assert rows == taken(text)
    assert taken(f"{path}#300") != taken(f"{path}#300", seed=2) != taken(f"{path}#300", number=1)
    middle = [int(row.split()[1]) for row in taken(f"{path}#300")]
    assert 400 < sum(middle) / 300 < 600
    assert middle == sorted(middle)


def test_more_than_there_are_is_whole_passes_and_a_sampled_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    for text, count in ((f"{path}#100", 100), (f"{path}#250%", 100)):
        times = Counter(taken(text))
        assert len(times) == 40
        assert Counter(times.values()) == {2: 20, 3: 20}
        assert sum(times.values()) == count


def test_every_record_is_equally_likely(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    times = Counter(row for seed in range(600) for row in taken(f"{path}#5", seed))
    assert min(times.values()) > 100 and max(times.values()) < 200  # of 150 expected, standard deviation 10.6


def test_one_text_names_one_input_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "with space.jsonl", "odd#5", "folder/c.jsonl"):
        write(Path(name), 2)
    assert parse_inputs(["a.jsonl"]) == [Input("a.jsonl")]
    assert parse_inputs(["a.jsonl#500 b.jsonl#20%"]) == [Input("a.jsonl", "500"), Input("b.jsonl", "20%")]
    assert parse_inputs(["a.jsonl", "b.jsonl#2"]) == [Input("a.jsonl"), Input("b.jsonl", "2")]
    assert parse_inputs(["with space.jsonl"]) == [Input("with space.jsonl")]
    assert parse_inputs(["with space.jsonl#1"]) == [Input("with space.jsonl", "1")]
    assert parse_inputs(["with space.jsonl#1\na.jsonl\n"]) == [Input("with space.jsonl", "1"), Input("a.jsonl")]
    assert parse_inputs(["odd#5"]) == [Input("odd#5")]
    assert parse_inputs(["odd#5#1"]) == [Input("odd#5", "1")]
    assert parse_inputs(["folder#1"]) == [Input("folder", "1")]
    assert parse_inputs(["owner/name#500 owner/name:part"]) == [Input("owner/name", "500"), Input("owner/name:part")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("nowhere.jsonl", "data file nowhere.jsonl does not exist"),
        ("data/nowhere.jsonl", "data file data/nowhere.jsonl does not exist"),
        ("a.jsonl b c.jsonl", "data file b does not exist.*paths with spaces"),
        ("a.jsonl#", "data file a.jsonl# does not exist"),
        ("a.jsonl#0", "'0' is not a number of records"),
        ("a.jsonl#-5", "'-5' is not a number of records"),
        ("a.jsonl#5x", "'5x' is not a number of records"),
        ("a.jsonl#0%", "'0%' is not a number of records"),
        (" ", "no data is named"),
    ],
)
def test_an_input_that_means_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), 2)
    with pytest.raises(UserError, match=message):
        parse_inputs([text])


def test_a_share_of_less_than_a_record_is_refused(tmp_path: Path) -> None:
    (given,) = parse_inputs([f"{write(tmp_path / 'a.jsonl', 10)}#1%"])
    with pytest.raises(UserError, match="1% of 10 records is less than one"):
        validated_source(given)


def test_the_result_of_a_mixture_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", 900)
    write(tmp_path / "b.jsonl", 700, "other")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    results = []
    for workers in ("1", "2"):
        inputs = ["--input", f"{tmp_path}/a.jsonl#1500", "--input", f"{tmp_path}/b.jsonl#40%"]
        prefix = ["--output-prefix", str(tmp_path / workers), "--num-workers", workers]
        common = ["--tokenizer", str(smollm2_folder()), "--seq-length", "256", *inputs, *prefix]
        assert tokenize.main(common) == 0
        results.append([(tmp_path / f"{workers}.{ending}").read_bytes() for ending in ("bin", "idx")])
    assert results[0] == results[1]
