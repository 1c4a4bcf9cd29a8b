"""verl's layout as people have it: what pandas, other recipes and other editors leave in a file."""

import base64
import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1v3.data import schema
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples, write_samples
from tests.data.sample_rows import a_row, png, write_rows

NAN = float("nan")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    schema._say_once.cache_clear()


def plain(**changes: Any) -> dict[str, Any]:
    """A row of a Parquet file."""
    return (
        a_row(images=[{"bytes": png()}], **changes) if "images" not in changes else a_row(**changes)
    )


def parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "d.parquet")
    return folder / "d.parquet"


def load(folder: Path, *rows: dict[str, Any]) -> list[Sample]:
    return load_samples(parquet(folder, *rows))


def info(**fields: Any) -> dict[str, Any]:
    return {"split": "train", "index": 0, **fields}


# Columns beside verl's.


@pytest.mark.parametrize(
    "value",
    ["hard", 3, 0.25, True, ["a", "b"], [1, 2], {"a": 1, "b": "x"}, [{"a": 1}], "", 2**62, [[0.5]]],
    ids=str,
)
@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
def test_further_columns_are_kept(name: str, value: Any, tmp_path: Path) -> None:
    """Fails if what a row says beyond verl's keys is refused, or lost when it is written again."""
    path = parquet(tmp_path, plain(level=value), plain(level=value))
    if name == "d.jsonl":
        path = write_rows(tmp_path / name, a_row(level=value), a_row(level=value))
    loaded = load_samples(path)
    assert [sample.columns for sample in loaded] == [{"level": value}] * 2
    for copy in ("copy.parquet", "copy.jsonl"):
        write_samples(tmp_path / copy, loaded)
        assert load_samples(tmp_path / copy) == loaded


def test_further_columns_with_gaps_are_kept_where_they_have_a_value(tmp_path: Path) -> None:
    """Fails if a missing value becomes NaN, which nothing can compare or write as JSON."""
    rows = [plain(level=1.5), plain(level=NAN), plain(level=None), plain()]
    loaded = load(tmp_path, *rows)
    assert [sample.columns for sample in loaded] == [{"level": 1.5}, {}, {}, {}]
    write_samples(tmp_path / "copy.parquet", loaded)
    assert load_samples(tmp_path / "copy.parquet") == loaded


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("__index_level_0__", 7, "column __index_level_0__ (the index of a pandas table)"),
        ("__index_level_0__", "a7", "column __index_level_0__ (the index of a pandas table)"),
        ("__index_level_1__", 7, "column __index_level_1__ (the index of a pandas table)"),
        ("__index_level_12__", None, "column __index_level_12__ (the index of a pandas table)"),
        ("thumbnail", b"\xff\xd8", "column thumbnail (bytes values, which JSON cannot hold)"),
        ("made", datetime.date(2026, 1, 2), "column made (date values, which JSON cannot hold)"),
        ("t", datetime.datetime(2026, 1, 2), "column t (datetime values, which JSON cannot hold)"),
        ("price", Decimal("1.20"), "column price (Decimal values, which JSON cannot hold)"),
        ("long", datetime.timedelta(1), "column long (timedelta values, which JSON cannot hold)"),
        ("pieces", [b"a"], "column pieces (list values, which JSON cannot hold)"),
    ],
)  # fmt: skip
def test_what_is_ignored_is_said_once(
    column: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a column vanishes unsaid, or is announced for every row and every reading."""
    path = parquet(tmp_path, *[plain(**{column: value, "level": 1})] * 5)
    for _ in range(3):
        assert [sample.columns for sample in load_samples(path)] == [{"level": 1}] * 5
    assert capsys.readouterr().out == f"{path}: ignored: {said}\n"


UNKNOWN_TO_JSON = {
    "date": datetime.date(2026, 1, 2),
    "datetime": datetime.datetime(2026, 1, 2, 3, 4),
    "time": datetime.time(3, 4),
    "timedelta": datetime.timedelta(1),
    "Decimal": Decimal("1.20"),
    "bytes": b"\xff\xd8",
    "float": float("inf"),
    "list": [b"a"],
    "dict": {"at": datetime.date(2026, 1, 2)},
}


@pytest.mark.parametrize("kind", UNKNOWN_TO_JSON)
@pytest.mark.parametrize("key", ["extra_info", "reward_model"])
def test_further_keys_that_json_cannot_hold_are_ignored_and_said(
    kind: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a row is wrong for a key that nothing reads, where such a column would not be."""
    row = plain(extra_info=info(level=1))
    row[key] = {**row[key], "made": UNKNOWN_TO_JSON[kind]}
    (sample,) = load(tmp_path, row)
    assert "made" not in getattr(sample, key) and sample.extra_info["level"] == 1
    said = f"ignored: {key}.made ({kind} values, which JSON cannot hold)\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.parametrize(
    ("kind", "given", "kept"),
    [
        (pa.string(), "x", "x"), (pa.int64(), 3, 3), (pa.float64(), 0.5, 0.5),
        (pa.float64(), NAN, None), (pa.bool_(), True, True), (pa.string(), None, None),
        (pa.list_(pa.float64()), [1.0, NAN], [1.0, None]),
        (pa.map_(pa.string(), pa.float64()), [("b", NAN)], [["b", None]]),
        (pa.timestamp("us"), datetime.datetime(2026, 1, 2), "ignored"),
        (pa.binary(), b"x", "ignored"), (pa.float64(), float("inf"), "ignored"),
    ],
    ids=str,
)  # fmt: skip
def test_columns_of_maps_are_lists_of_pairs(
    kind: pa.DataType, given: Any, kept: Any, tmp_path: Path
) -> None:
    """Fails if a value in a map makes its row wrong, where such a value elsewhere would not."""
    table = pa.Table.from_pylist([plain()])
    maps = pa.array([[("a", given)]], pa.map_(pa.string(), kind))
    pq.write_table(table.append_column("meta", maps), tmp_path / "d.parquet")
    (sample,) = load_samples(tmp_path / "d.parquet")
    assert sample.columns == ({} if kept == "ignored" else {"meta": [["a", kept]]})
    write_samples(tmp_path / "copy.jsonl", [sample])
    assert load_samples(tmp_path / "copy.jsonl") == [sample]


def test_everything_that_is_ignored_stands_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a file with several oddities fills the screen."""
    row = plain(
        __index_level_0__=3, blob=b"x", reward_model={"style": "model", "ground_truth": "3"}
    )
    load(tmp_path, row, row)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.count(";") == 2 and "blob" in line and "graded by rule" in line


def test_an_ordinary_file_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if every run begins with noise."""
    load(tmp_path, plain(level="x"), plain(level="y"))
    assert capsys.readouterr().out == ""


# Keys of verl's columns.


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (0, 0), (-3, -3), (2**62, 2**62), (7.0, 7), ("7", "7"), ("train-00017", "train-00017"),
        ("", ""), ("geo/3:1", "geo/3:1"), ("漢字", "漢字"), (-(2**63), -(2**63)), ("a\nb", "a\nb"),
    ],
)  # fmt: skip
def test_an_index_is_a_number_or_a_name(given: Any, kept: Any, tmp_path: Path) -> None:
    """Fails if rows must be renumbered before they can be read."""
    (sample,) = load(tmp_path, plain(extra_info=info(index=given)))
    assert sample.index == kept and type(sample.index) is type(kept)
    for name in ("copy.parquet", "copy.jsonl"):
        write_samples(tmp_path / name, [sample])
        assert load_samples(tmp_path / name) == [sample]


def test_numbers_and_names_in_one_file_are_kept_as_json_lines(tmp_path: Path) -> None:
    """Fails if Parquet would turn 1 into "1"."""
    path = write_rows(tmp_path / "d.jsonl", *[a_row(extra_info=info(index=i)) for i in (1, "b")])
    samples = load_samples(path)
    with pytest.raises(ValueError, match=r"Parquet cannot hold extra_info\['index'\]"):
        write_samples(tmp_path / "copy.parquet", samples)
    write_samples(tmp_path / "copy.jsonl", samples)
    assert load_samples(tmp_path / "copy.jsonl") == samples


@pytest.mark.parametrize("split", ["absent", None, NAN, "train", "val", ""])
def test_a_row_need_not_belong_to_a_split(split: Any, tmp_path: Path) -> None:
    """Fails if a file that is one split cannot be read because it does not say so."""
    extra = {"index": 0} if split == "absent" else {"index": 0, "split": split}
    (sample,) = load_samples(write_rows(tmp_path / "d.jsonl", a_row(extra_info=extra)))
    assert sample.split == (split if isinstance(split, str) and split != "absent" else None)
    write_samples(tmp_path / "copy.parquet", [sample])
    assert load_samples(tmp_path / "copy.parquet") == [sample]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (72, "72"), (-1, "-1"), (0, "0"), (3.0, "3"), (0.5, "0.5"), (-2.25, "-2.25"),
        (1e300, "1e+300"), (2**60, str(2**60)), (1e-7, "1e-07"), (Decimal("1.50"), "1.50"),
        ("3", "3"), ("3.0", "3.0"), ("", ""),
    ],
    ids=str,
)  # fmt: skip
def test_a_number_as_ground_truth_is_its_text(given: Any, text: str, tmp_path: Path) -> None:
    """Fails if a column of numbers has to be rewritten, or 3 becomes 3.0 on the way."""
    (sample,) = load(tmp_path, plain(reward_model={"style": "rule", "ground_truth": given}))
    assert sample.ground_truth == text


@pytest.mark.parametrize(
    "given", [NAN, None, float("inf"), True, ["3"], {"target": "3"}, b"3"], ids=str
)
def test_a_ground_truth_that_is_no_text_or_number_is_refused(given: Any, tmp_path: Path) -> None:
    """Fails if a row without an answer is trained on: nothing could be right."""
    with pytest.raises(ValueError, match=r"row 0: reward_model\.ground_truth: "):
        load(tmp_path, plain(reward_model={"style": "rule", "ground_truth": given}))


@pytest.mark.parametrize(
    "style",
    ["model", "rule-lighteval/MATH_v2", "rule-based", "llm", "math", "function", "", "RULE",
     "multiple choice", "xyz" * 9],
)  # fmt: skip
def test_another_style_is_graded_by_rule_and_said(
    style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if other recipes' rows are refused, or graded otherwise than they ask unsaid."""
    (sample,) = load(
        tmp_path, plain(reward_model={"style": style, "ground_truth": "3", "hint": "x"})
    )
    assert sample.reward_model == {"style": style, "ground_truth": "3", "hint": "x"}
    said = f"ignored: reward_model.style {style!r} (answers are graded by rule)\n"
    assert capsys.readouterr().out.endswith(said)
    write_samples(tmp_path / "copy.parquet", [sample])
    assert load_samples(tmp_path / "copy.parquet") == [sample]


@pytest.mark.parametrize("ability", [None, NAN, "math", ""])
def test_a_row_need_not_name_an_ability(ability: Any, tmp_path: Path) -> None:
    """Fails if a column that nothing reads decides whether a row can be trained on."""
    (sample,) = load(tmp_path, plain(ability=ability))
    assert sample.ability == (ability if isinstance(ability, str) else None)
    write_samples(tmp_path / "copy.parquet", [sample])
    assert load_samples(tmp_path / "copy.parquet") == [sample]


EXTRAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "further": ({"difficulty": NAN}, {}),
    "several": ({"a": NAN, "b": 1.0, "c": NAN}, {"b": 1.0}),
    "domain": ({"domain": NAN}, {"domain": None}),
    "options": ({"options": NAN}, {"options": None}),
    "answer": ({"answer": NAN}, {"answer": None}),
    "number as answer": ({"answer": 72}, {"answer": "72"}),
    "response": ({"response": NAN}, {"response": None}),
    "question": ({"question": NAN}, {"question": None}),
    "split": ({"split": NAN}, {"split": None}),
    "in a list": ({"scores": [1.0, NAN]}, {"scores": [1.0, None]}),
    "in an object": ({"meta": {"a": NAN, "b": 2.0}}, {"meta": {"a": None, "b": 2.0}}),
    "deep": ({"meta": [{"a": [NAN]}]}, {"meta": [{"a": [None]}]}),
}


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
def test_nan_in_extra_info_is_no_value(kind: str, name: str, tmp_path: Path) -> None:
    """Fails if a gap in a table of pandas makes its row wrong, or a NaN is kept as a value."""
    given, kept = EXTRAS[kind]
    row = info(**given)
    if name == "d.jsonl":  # json.dumps writes NaN
        (sample,) = load_samples(write_rows(tmp_path / name, a_row(extra_info=row)))
    else:
        (sample,) = load(tmp_path, plain(extra_info=row))
    known = dict.fromkeys(("domain", "options", "question", "answer", "response"))
    assert sample.extra_info == {"split": "train", "index": 0, **known, **kept}


@pytest.mark.parametrize("row", [
    a_row(level=NAN), a_row(ability=NAN), a_row(extra_info=info(a=float("inf"))),
    a_row(extra_info=info(a=-float("inf"))), a_row(data_source=NAN), a_row(images=[NAN]),
], ids=range(6))  # fmt: skip
def test_nan_elsewhere_in_json_lines_is_refused(row: dict[str, Any], tmp_path: Path) -> None:
    """Fails if what is not JSON is read as some value."""
    with pytest.raises(ValueError, match=r"line 1: .* is not JSON"):
        load_samples(write_rows(tmp_path / "d.jsonl", row))


# Images.

TEXT = base64.b64encode(png()).decode()
IMAGES: dict[str, Any] = {
    "list of objects": [{"bytes": png(), "path": None}],
    "list of bytes": [png()],
    "list of paths": ["pictures/a.png"],
    "list of path objects": [{"path": "pictures/a.png", "bytes": None}],
    "object": {"bytes": png(), "path": None},
    "path object": {"bytes": None, "path": "pictures/a.png"},
    "bytes": png(),
    "path": "pictures/a.png",
    "address": f"data:image/png;base64,{TEXT}",
    "base64 object": {"bytes": TEXT},
    "object with its name": {"bytes": png(), "path": "gone.png"},
    "broken into lines": {"bytes": base64.encodebytes(png()).decode()},
    "address as bytes": {"bytes": f"data:image/png;base64,{TEXT}"},
    "address as path": {"path": f"data:image/png;base64,{TEXT}"},
    "address of a file": ["file://pictures/a.png"],
    "quoted address of a file": "file://pictures/%61.png",
    "image object": [{"image": "pictures/a.png"}],
    "image object with an address": [{"image": "file://pictures/a.png", "max_pixels": 9}],
    "image object beside others": {"bytes": None, "path": None, "image": "pictures/a.png"},
    "gap": [None, png()],
    "empty object": [{"bytes": png(), "path": None}, {"bytes": None, "path": None}],
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_read_in_every_form(kind: str, tmp_path: Path) -> None:
    """Fails if a column of single pictures, or of paths, has to be rewritten."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png())
    (sample,) = load(tmp_path, plain(images=IMAGES[kind]))
    assert sample.images == [png()]


@pytest.mark.parametrize("place", [
    "file:///etc/hostname", "file://../a.png", "file://%2e%2e/a.png", "file:///%2e%2e/a.png",
    "file://pictures/%2e%2e/%2e%2e/a.png",
])  # fmt: skip
@pytest.mark.parametrize("key", ["path", "image"])
def test_addresses_of_files_stay_inside_the_folder(place: str, key: str, tmp_path: Path) -> None:
    """Fails if a data file can read any file of the machine."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "rows").mkdir()
    for images in (place, [{key: place}]):
        with pytest.raises(ValueError, match="leads out of the data file's folder"):
            load(tmp_path / "rows", plain(images=images))


@pytest.mark.parametrize(
    "images",
    [
        None, [], NAN, [None], [None, None], {"bytes": None}, {"bytes": None, "path": None},
        [{"bytes": None, "path": None}], [{"image": None}], {"image": None, "path": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_may_have_no_images(images: Any, tmp_path: Path) -> None:
    """Fails if rows of text cannot stand beside rows with pictures."""
    prompt = [{"role": "user", "content": "2+3?"}]
    (sample,) = load(tmp_path, a_row(images=images, prompt=prompt))
    assert sample.images == []


def test_keys_that_only_other_messages_have_are_left_out(tmp_path: Path) -> None:
    """Fails if a key of one message, which Parquet adds to all as null, makes the others wrong."""
    prompt = [{"role": "user", "content": "<image>", "tool_calls": None, "name": None}]
    (sample,) = load(tmp_path, plain(prompt=prompt))
    assert sample.prompt == [{"role": "user", "content": "<image>"}]


# Byte order marks.


@pytest.mark.parametrize("lines", [
    [0], [0, 1], [0, 1, 2], [0, None, 1], [None, 0], [None, None, 0, 1],
], ids=str)  # fmt: skip
def test_json_lines_may_begin_with_a_byte_order_mark(
    lines: list[int | None], tmp_path: Path
) -> None:
    """Fails if a file that was saved by a Windows editor is not JSON in its first line."""
    texts = ["" if i is None else json.dumps(a_row(extra_info=info(index=i))) for i in lines]
    (tmp_path / "d.jsonl").write_bytes("\n".join(texts).encode("utf-8-sig"))
    assert [s.index for s in load_samples(tmp_path / "d.jsonl")] == [
        i for i in lines if i is not None
    ]


def test_a_mark_elsewhere_is_not_skipped(tmp_path: Path) -> None:
    """Fails if damage in the middle of a file goes unnoticed."""
    data = b"\n".join(b"\xef\xbb\xbf" * i + json.dumps(a_row()).encode() for i in (0, 1))
    (tmp_path / "d.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match="line 2: is not JSON"):
        load_samples(tmp_path / "d.jsonl")
