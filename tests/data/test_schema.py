"""Sample files: layout, round trips, and every way in which a file can be wrong."""

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
from pydantic import ValidationError

from r1v3.data.schema import Sample, load_samples, make_sample, write_samples


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def a_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "data_source": "test",
        "prompt": [{"role": "user", "content": "<image>\nHow many?"}],
        "images": [{"bytes": base64.b64encode(png()).decode()}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"split": "train", "index": 0},
    }
    return {**row, **changes}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_samples() -> list[Sample]:
    return [
        make_sample(question="How many?", ground_truth="3", images=[png()], data_source="a",
                    index=0, domain="counting", response="<think>ü\n</think>\\boxed{3}",
                    difficulty=0.5, tags=["x", "y"]),
        make_sample(question="Which? 漢字 \x00 \u2028", ground_truth="B", options=["10", "12"],
                    images=[png(1), png(2)], data_source="b", index=2**62, split="test",
                    system="Be brief.", difficulty=1.5),
        make_sample(question="No picture", ground_truth="", data_source="c", index=-1, options=[]),
    ]  # fmt: skip


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


def test_properties() -> None:
    """What trainers and rewards read off a sample."""
    counting, which, text = some_samples()
    assert (counting.question, counting.ground_truth, counting.domain) == (
        "How many?", "3", "counting",
    )  # fmt: skip
    assert counting.response == "<think>ü\n</think>\\boxed{3}" and counting.options is None
    assert which.options == ["10", "12"] and which.split == "test" and which.response is None
    assert [message["role"] for message in which.prompt] == ["system", "user"]
    assert which.prompt[1]["content"].startswith("<image>\n<image>\nWhich?")
    assert which.prompt[1]["content"].endswith("\nOptions:\nA. 10\nB. 12")
    assert text.images == []
    inferred = Sample.model_validate(a_row(images=[png()]))
    assert inferred.question == "How many?"


def test_samples_are_immutable() -> None:
    """Stages share samples; one must not change them under another."""
    with pytest.raises(ValidationError):
        some_samples()[0].ability = "other"  # type: ignore[misc]


def without(key: str) -> dict[str, Any]:
    row = a_row()
    del row[key]
    return row


WRONG_ROWS: dict[str, tuple[Any, str]] = {
    "missing source": (without("data_source"), "data_source: Field required"),
    "missing prompt": (without("prompt"), "prompt: Field required"),
    "missing reward": (without("reward_model"), "reward_model: Field required"),
    "missing extra": (without("extra_info"), "extra_info: Field required"),
    "missing index": (a_row(extra_info={"split": "x"}), "extra_info.index: Field required"),
    "missing truth": (a_row(reward_model={"style": "rule"}), "reward_model.ground_truth: Field"),
    "number as truth": (
        a_row(reward_model={"style": "rule", "ground_truth": 3}),
        "reward_model.ground_truth: Input should be a valid string",
    ),
    "other style": (
        a_row(reward_model={"style": "model", "ground_truth": "3"}),
        "reward_model.style: Input should be 'rule'",
    ),
    "text as index": (
        a_row(extra_info={"split": "x", "index": "0"}),
        "extra_info.index: Input should be a valid integer",
    ),
    "truth value as index": (
        a_row(extra_info={"split": "x", "index": True}),
        "extra_info.index: Input should be a valid integer",
    ),
    "huge index": (a_row(extra_info={"split": "x", "index": 2**63}), "64 bits"),
    "text as options": (
        a_row(extra_info={"split": "x", "index": 0, "options": "AB"}),
        "extra_info.options: must be a list, not str",
    ),
    "number among options": (
        a_row(extra_info={"split": "x", "index": 0, "options": ["1", 2]}),
        "extra_info.options[1]: Input should be a valid string",
    ),
    "prompt as text": (a_row(prompt="<image>"), "prompt: must be a list, not str"),
    "empty prompt": (a_row(prompt=[], images=[]), "no message with role 'user'"),
    "unknown role": (
        a_row(prompt=[{"role": "human", "content": "<image>"}]),
        "prompt[0].role: Input should be 'system'",
    ),
    "content missing": (a_row(prompt=[{"role": "user"}]), "prompt[0].content: Field required"),
    "unknown key": (a_row(imges=[]), "imges: unknown key"),
    "unknown message key": (
        a_row(prompt=[{"role": "user", "content": "<image>", "name": "x"}]),
        "prompt[0].name: unknown key",
    ),
    "more placeholders": (
        a_row(prompt=[{"role": "user", "content": "<image><image>"}]),
        "2 <image> placeholders and images has 1",
    ),
    "fewer placeholders": (
        a_row(prompt=[{"role": "user", "content": "x"}]),
        "0 <image> placeholders and images has 1",
    ),
    "images as text": (a_row(images="a.png"), "images: must be a list, not str"),
    "number as image": (a_row(images=[3]), "images[0]: must be bytes, a path or an object"),
    "empty image object": (a_row(images=[{}]), 'images[0]: an object must hold "bytes"'),
    "not base64": (a_row(images=[{"bytes": "a.png!"}]), "images[0]: is not base64"),
    "not an image": (
        a_row(images=[{"bytes": base64.b64encode(b"text").decode()}]),
        "images[0] is not an image",
    ),
    "damaged image": (
        a_row(images=[{"bytes": base64.b64encode(png()[:30]).decode()}]),
        "images[0] is",
    ),
    "missing image": (a_row(images=["gone.png"]), "images[0]: path 'gone.png' is not a file"),
    "folder as image": (a_row(images=["."]), "images[0]: path '.' is not a file"),
    "parent folder": (a_row(images=["../secret.png"]), "leads out of the data file's folder"),
    "hidden parent": (a_row(images=["a/../../secret.png"]), "leads out of"),
    "absolute path": (a_row(images=[{"path": "/etc/passwd"}]), "leads out of"),
    "link out": (a_row(images=["link.png"]), "leads out of"),
    "link to itself": (a_row(images=["loop.png"]), "images[0]: path 'loop.png'"),
    "NUL in path": (a_row(images=["a\x00b"]), "images[0]: "),
    "long path": (a_row(images=["x" * 5000]), "images[0]: path 'xxx"),
    "a list": ([1], "a row must be an object, not list"),
    "lone surrogate": (a_row(ability="\ud800"), "not valid Unicode"),
}


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_a_wrong_row_is_named_with_key_and_reason(tmp_path: Path, kind: str) -> None:
    """One bad row among many must be found without opening the file."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    row, reason = WRONG_ROWS[kind]
    path = write_rows(folder / "d.jsonl", a_row(), row, a_row())
    with pytest.raises(ValueError) as caught:
        load_samples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 1 wrong rows\n  line 2: ")
    assert reason in message
    assert len(message) < 1000


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


def test_every_fault_of_a_row_is_listed(tmp_path: Path) -> None:
    """Fixing one key per attempt is tedious."""
    row = {key: value for key, value in a_row().items() if key not in ("ability", "data_source")}
    with pytest.raises(ValueError, match="data_source: Field required; ability: Field required"):
        load_samples(write_rows(tmp_path / "d.jsonl", row))


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


def test_further_keys_must_be_json() -> None:
    """Found when a sample is made, not an hour later when it is written."""
    for value in (float("nan"), {1, 2}, b"bytes"):
        with pytest.raises(ValueError, match="JSON"):
            make_sample(question="q", ground_truth="1", data_source="t", index=0, note=value)
