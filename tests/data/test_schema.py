"""Sample files: layout, round trips, and files that are damaged, empty or missing."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from r1v3.data.sample import make_sample
from r1v3.data.schema import load_samples, write_samples
from tests.data.sample_rows import a_row, png, some_samples, without, write_rows


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
def test_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    """A sample must come back equal, down to bytes, None, empty lists and odd characters."""
    samples = some_samples()
    write_samples(tmp_path / name, samples)
    loaded = load_samples(tmp_path / name)
    assert loaded == samples
    assert [json.dumps(s.extra_info) for s in loaded] == [json.dumps(s.extra_info) for s in samples]


def test_parquet_and_jsonl_convert_into_each_other(tmp_path: Path) -> None:
    """There and back must reproduce the very bytes of the JSON file."""
    first, middle, last = (tmp_path / n for n in ("a.jsonl", "b.parquet", "c.jsonl"))
    write_samples(first, some_samples())
    write_samples(middle, load_samples(first))
    write_samples(last, load_samples(middle))
    assert first.read_bytes() == last.read_bytes()


def test_many_row_groups_keep_their_order(tmp_path: Path) -> None:
    """600 rows span three Parquet row groups."""
    samples = [
        make_sample(question="q", ground_truth="1", data_source="t", index=i) for i in range(600)
    ]
    write_samples(tmp_path / "d.parquet", samples)
    assert pq.ParquetFile(tmp_path / "d.parquet").num_row_groups == 3
    assert [sample.index for sample in load_samples(tmp_path / "d.parquet")] == list(range(600))


def test_parquet_rows_have_verls_layout(tmp_path: Path) -> None:
    """verl's dataset reads these keys; its images must be objects with real bytes."""
    write_samples(tmp_path / "d.parquet", some_samples()[:1])
    (row,) = pq.read_table(tmp_path / "d.parquet").to_pylist()
    assert row == {
        "data_source": "a",
        "prompt": [{"role": "user", "content": "<image>\nHow many?"}],
        "images": [{"bytes": png()}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {
            "split": "train", "index": 0, "domain": "counting", "options": None,
            "question": "How many?", "answer": "3", "response": "<think>ü\n</think>\\boxed{3}",
            "difficulty": 0.5, "tags": ["x", "y"],
        },
    }  # fmt: skip
    segments = row["prompt"][0]["content"].split("<image>")
    assert len(segments) - 1 == len(row["images"])
    assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (5, 4)


def test_a_file_in_the_form_of_verls_examples_loads(tmp_path: Path) -> None:
    """Its geometry example stores images as {bytes, path} and only four extra keys."""
    row = a_row(
        images=[{"bytes": png(), "path": None}],
        extra_info={"split": "train", "index": 7, "answer": "3", "question": "<image>How many?"},
    )
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "geo.parquet")
    (sample,) = load_samples(tmp_path / "geo.parquet")
    assert (sample.index, sample.images, sample.domain) == (7, [png()], None)


def test_bare_bytes_load_from_parquet(tmp_path: Path) -> None:
    """Some converters write a plain binary list."""
    pq.write_table(pa.Table.from_pylist([a_row(images=[png(9)])]), tmp_path / "d.parquet")
    assert load_samples(tmp_path / "d.parquet")[0].images == [png(9)]


def test_every_form_of_image_loads_from_jsonl(tmp_path: Path) -> None:
    """Path, path object, base64 object and data address all give the same bytes."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    text = base64.b64encode(png()).decode()
    forms = [
        "images/a.png",
        {"path": "images/../images/a.png"},
        {"bytes": text},
        {"bytes": text, "path": "ignored.png"},
        f"data:image/png;base64,{text}",
        str(tmp_path / "images" / "a.png"),
    ]
    path = write_rows(tmp_path / "d.jsonl", *[a_row(images=[form]) for form in forms])
    assert [sample.images for sample in load_samples(path)] == [[png()]] * len(forms)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "is not JSON"), (b"nonsense", "is not JSON"), (b'"text"', "not str"),
        (b'{"a": NaN}', "NaN is not JSON"), (b"\xff\xfe", "utf-8"), (b"[" * 100_000, "line 3"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 3"), (b"null", "not NoneType"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    """Blank lines are skipped but counted, so that the number fits an editor's."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(a_row()).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        load_samples(path)
    assert reason in str(caught.value)


def test_wrong_parquet_rows_are_named_by_index(tmp_path: Path) -> None:
    """Parquet has no lines; the index counts from 0 as every reader of it does."""
    rows = [a_row(images=[{"bytes": png()}]) for _ in range(300)]
    rows[299] = a_row(images=[{"bytes": b"no image"}])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"1 wrong rows\n  row 299: images\[0\] is not an image"):
        load_samples(tmp_path / "d.parquet")


def test_wrong_rows_are_reported_together(tmp_path: Path) -> None:
    """Ten at a time and a count: neither one per run nor a million lines."""
    path = write_rows(tmp_path / "d.jsonl", a_row(), *[without("ability")] * 25)
    with pytest.raises(ValueError) as caught:
        load_samples(path)
    message = str(caught.value)
    assert "25 wrong rows" in message and message.endswith("and 15 more")
    assert message.count("ability: Field required") == 10
    assert "line 2:" in message and "line 11:" in message and "line 12:" not in message


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
def test_missing_and_empty_files(tmp_path: Path, name: str) -> None:
    """An empty data set would otherwise train zero steps and look finished."""
    path = tmp_path / name
    with pytest.raises(ValueError, match="no such file"):
        load_samples(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=name):
        load_samples(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="no such file"):
        load_samples(path)


def test_empty_parquet_table(tmp_path: Path) -> None:
    """A table of no rows is a readable file and still no data."""
    write_samples(tmp_path / "d.parquet", some_samples())
    table = pq.read_table(tmp_path / "d.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="holds no samples"):
        load_samples(tmp_path / "d.parquet")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_parquet(tmp_path: Path, keep: float) -> None:
    """A copy that was cut off must not load as fewer rows."""
    path = tmp_path / "d.parquet"
    write_samples(path, some_samples())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=r"d\.parquet: is not a readable Parquet file"):
        load_samples(path)


def test_damaged_parquet_pages_are_an_error(tmp_path: Path) -> None:
    """Overwritten bytes must give an error that names the file; they must not pass as data."""
    path = tmp_path / "d.parquet"
    samples = some_samples()
    write_samples(path, samples)
    data = bytearray(path.read_bytes())
    for position in range(0, len(data) - 8, 29):
        damaged = bytearray(data)
        damaged[position : position + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        try:
            assert load_samples(path) == samples
        except ValueError as error:
            assert "d.parquet" in str(error)


def test_other_names_are_refused(tmp_path: Path) -> None:
    """Guessing a format from content would make errors confusing."""
    (tmp_path / "d.csv").write_text("a")
    with pytest.raises(ValueError, match=r"\.parquet or \.jsonl"):
        load_samples(tmp_path / "d.csv")
    with pytest.raises(ValueError, match=r"\.parquet or \.jsonl"):
        write_samples(tmp_path / "d.csv", some_samples())


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
def test_writing_nothing_is_refused(tmp_path: Path, name: str) -> None:
    """The file could not be loaded again."""
    with pytest.raises(ValueError, match="no samples"):
        write_samples(tmp_path / name, [])
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle must not cost the data that was there."""
    path = tmp_path / name
    write_samples(path, some_samples())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_samples(path, some_samples()[:1])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    """A temporary file's 0600 would lock colleagues out of shared data."""
    write_samples(tmp_path / "d.jsonl", some_samples())
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "d.jsonl").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("values", [(1, 0.5), (True, 1), ([], {}), ({"a": 1}, {"b": 2}), (1, "1"),
                                    (2**64, 1), ({}, {})])  # fmt: skip
def test_parquet_refuses_what_it_cannot_hold_exactly(tmp_path: Path, values: tuple[Any]) -> None:
    """Arrow would turn 1 into 1.0 or fill in missing keys; JSON lines keep all of these."""
    samples = [
        make_sample(question="q", ground_truth="1", data_source="t", index=i, note=value)
        for i, value in enumerate(values)
    ]
    with pytest.raises(ValueError, match=r"extra_info\['note'\]"):
        write_samples(tmp_path / "d.parquet", samples)
    assert os.listdir(tmp_path) == []
    write_samples(tmp_path / "d.jsonl", samples)
    loaded = load_samples(tmp_path / "d.jsonl")
    assert [json.dumps(s.extra_info["note"]) for s in loaded] == [json.dumps(v) for v in values]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    """The first file of a run folder should not fail for want of the folder."""
    write_samples(tmp_path / "a" / "b" / "d.jsonl", some_samples())
    assert load_samples(tmp_path / "a" / "b" / "d.jsonl") == some_samples()
