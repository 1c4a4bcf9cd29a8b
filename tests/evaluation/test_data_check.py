"""`r1v3 data check` says what stages will read of a file, and names every row that is wrong."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from r1v3.cli import app
from r1v3.data.schema import load_samples
from r1v3.evaluation.data_check import check_files
from tests import tiny
from tests.data.sample_rows import a_row, png, without, write_rows

RUNNER = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("check") / "model")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
CUT = encoded(NOISE, "JPEG")[:-300]


def turned() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(NOISE, "JPEG", exif=exif.tobytes())


def showing(*images: bytes, **changes: Any) -> dict[str, Any]:
    row = a_row(
        prompt=[{"role": "user", "content": "<image>" * len(images) + "\nHow many?"}], **changes
    )
    return row | {"images": [{"bytes": base64.b64encode(image).decode()} for image in images]}


def checked(
    capsys: pytest.CaptureFixture[str], path: Path, **settings: Any
) -> tuple[bool, dict[str, list[str]]]:
    """Whether all is right, and the lines of every section without their title."""
    right = check_files([path], **settings)
    sections: dict[str, list[str]] = {}
    title = "head"
    for line in capsys.readouterr().out.splitlines():
        title = line[:10].strip() or title if line[:1] != " " else title
        sections.setdefault(title, []).append(line[10:])
    return right, sections


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": (a_row(reward_model={"style": "rule"}), "reward_model.ground_truth: Field"),
    "no source": (without("data_source"), "data_source: Field required"),
    "no ability": (without("ability"), "ability: Field required"),
    "too few pictures": (a_row(images=[]), "images has 0 entries"),
    "too many pictures": (a_row(prompt=[{"role": "user", "content": "?"}]), "images has 1 entries"),
    "another role": (a_row(prompt=[{"role": "human", "content": "<image>"}]), "prompt[0].role"),
    "a path that is not there": (a_row(images=["gone.png"]), "'gone.png' is not a file"),
    "a path outside": (a_row(images=["../gone.png"]), "leads out of the data file's folder"),
    "no picture": (showing(b"text"), "images[0] is not an image"),
    "a truncated picture": (showing(png(), CUT), "images[1] is truncated"),
    "a damaged picture": (
        showing(encoded(NOISE, "JPEG")[:700] + b"\xff" * 60 + encoded(NOISE, "JPEG")[760:]),
        "images[0]: image of",
    ),
    "no index": (a_row(extra_info={"split": "train"}), "extra_info.index: Field required"),
    "a list as answer": (
        a_row(reward_model={"style": "rule", "ground_truth": ["3"]}), "reward_model.ground_truth",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_row_is_named_and_the_exit_code_says_so(kind: str, tmp_path: Path) -> None:
    """Fails if the check passes a file that a stage refuses, or does not say which row it is."""
    row, reason = WRONG[kind]
    path = write_rows(tmp_path / "d.jsonl", a_row(), a_row(), row, a_row())
    done = RUNNER.invoke(app, ["data", "check", str(path)])
    (problem,) = (line for line in done.output.splitlines() if line.startswith("problems"))
    assert problem.split()[1:3] == ["line", "3"] and reason in problem
    assert done.output.splitlines()[-1] == "1 problem in 4 rows" and done.exit_code == 1


def test_a_right_file_passes(tmp_path: Path) -> None:
    """Fails if a script that checks before it trains never gets to train."""
    done = RUNNER.invoke(app, ["data", "check", str(write_rows(tmp_path / "d.jsonl", a_row()))])
    assert done.exit_code == 0 and done.output.splitlines()[-1] == "every row can be read"


@pytest.mark.parametrize("kind", WRONG)
def test_the_check_finds_what_a_stage_refuses(kind: str, tmp_path: Path, model: Path) -> None:
    """Fails if the two read a file in different ways."""
    path = write_rows(tmp_path / "d.jsonl", WRONG[kind][0])
    assert not check_files([path]) and not check_files([path], model=model)
    if kind not in ("a truncated picture", "a damaged picture"):  # found when they are decoded
        with pytest.raises(ValueError):
            load_samples(path)


def test_every_part_of_a_file_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a person cannot see from the report what their columns and pictures become."""
    deep = encoded(Image.fromarray(np.full((50, 50), 999, dtype=np.uint16)))
    clear = encoded(NOISE.convert("RGBA"))
    rows = [
        a_row(images=[{"bytes": data}], level=1, blob=b"x", __index_level_0__=7,
              reward_model={"style": "model", "ground_truth": 12.0}, data_source=source,
              extra_info={"index": "a", "hint": "h", "response": response, "options": options})
        for data, source, response, options in (
            (png(), "maze", "So 3.", ["1", "2"]), (turned(), "geo", None, None),
            (clear, "geo", "3", None), (deep, "geo", "3", None),
        )
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    right, found = checked(capsys, tmp_path / "d.parquet")
    assert right and found["columns"] == [
        "read        data_source, prompt, images, ability, reward_model, extra_info",
        "kept        level",
        "kept        extra_info: hint",
        "ignored     column blob (bytes values, which JSON cannot hold), 4 rows",
        "ignored     column __index_level_0__ (the index of a pandas table), 4 rows",
        "ignored     reward_model.style 'model' (answers are graded by rule), 4 rows",
        "",
    ]
    assert found["rows"] == [
        "data_source geo 3, maze 1",
        "ability     math 4",
        "options     in 1 row",
        "response    in 3 rows (supervised stages need one in every row)",
        "",
    ]
    assert found["pictures"][:2] == [
        "number      4 in 4 rows, at most 1 in one",
        "kinds       PNG RGB 1, JPEG RGB 1, PNG RGBA 1, PNG I;16 1",
    ]
    assert found["pictures"][2] == "pixels      5 x 4 to 90 x 60, median 60 x 90"
    assert [line.split("of these")[1].strip() for line in found["pictures"][5:8]] == [
        "1 turned (to their EXIF orientation)",
        "1 transparent (laid on white)",
        "1 of more than 8 bits (scaled to 8)",
    ]
    assert found["sample"] == [
        "row         row 0", "user        <image>\\nHow many?", "options     1, 2",
        "truth       12", "response    So 3.", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "told", "tiles"),
    [
        ((448, 448), None, 1), ((640, 480), None, 13), ((1920, 1080), None, 9), ((28, 28), None, 1),
        ((640, 480), 1, 1), ((900, 900), None, 5), ((100, 900), None, 10), ((900, 100), 4, 5),
        ((800, 600), 6, 7), ((5, 4), None, 13),
    ],
)  # fmt: skip
def test_tiles_are_those_that_a_stage_cuts(
    size: tuple[int, int], told: int | None, tiles: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Fails if the report counts other tiles than the model will be shown."""
    path = write_rows(tmp_path / "d.jsonl", showing(encoded(Image.new("RGB", size))))
    _, found = checked(capsys, path, max_tiles=told)
    assert found["pictures"][3] == f"tiles       {tiles} to {tiles} each, {tiles}.0 on average"


def test_tokens_are_counted_with_a_model_and_compared_with_its_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """Fails if rows that no stage could train on are found only when it starts."""
    rows = [
        a_row(extra_info={"split": "train", "index": i, "response": "So 3. " * n})
        for i, n in enumerate((1, 2, 400))
    ]
    right, found = checked(capsys, write_rows(tmp_path / "d.jsonl", *rows), model=model)
    assert not right
    assert found["tokens"][0].startswith("prompt      50 % ")
    assert found["tokens"][1].endswith("(line 3)")
    assert found["problems"][0].startswith("line 3      prompt ")
    assert "tokens; the model has 512 positions" in found["problems"][0]
    assert any(f"of {tiny.IMAGE_SIZE} pixels, at most 1 ({model})" in s for s in found["pictures"])


@pytest.mark.parametrize(
    ("choice", "right", "said", "verdict"),
    [
        ("error", False, "1 truncated (an error)", "1 problem in 2 rows"),
        ("accept", True, "1 truncated (padded)", "every row can be read"),
        (
            "skip", True, "1 truncated (their rows are left out)",
            "1 row will be left out; every other one can be read",
        ),
    ],
)  # fmt: skip
def test_truncated_pictures_count_as_a_stage_would_take_them(
    choice: Any, right: bool, said: str, verdict: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Fails if the check refuses what the stage is told to accept, or hides it."""
    path = write_rows(tmp_path / "d.jsonl", a_row(), showing(CUT))
    assert check_files([path], truncated=choice) is right
    out = capsys.readouterr().out
    assert said in out and out.splitlines()[-1] == verdict


def test_texts_of_a_file_cannot_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a file's escape sequences reach the terminal, or one value fills the screen."""
    hostile = "\x1b[31m\x07\u202e [red]"
    row = a_row(
        prompt=[{"role": "user", "content": "<image>" + hostile + "x" * 5000}],
        data_source=hostile, ability=hostile * 100, **{hostile: 1},
        reward_model={"style": hostile, "ground_truth": hostile},
    )  # fmt: skip
    check_files([write_rows(tmp_path / "d.jsonl", row)])
    out = capsys.readouterr().out
    assert not any(c in out for c in "\x1b\x07\u202e") and "[red]" in out
    assert max(map(len, out.splitlines())) < 300


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning", "ignore:Truncated:UserWarning")
@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG"])
@pytest.mark.parametrize("kept", [0.5, 0.7, 0.8, 0.9])
def test_damage_in_later_frames_ends_no_check(kind: str, kept: float, tmp_path: Path) -> None:
    """Fails if frames that no stage reads end the report of all rows with a traceback."""
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue", "green", "black")]
    whole = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    path = write_rows(tmp_path / "d.jsonl", showing(whole[: int(len(whole) * kept)]))
    done = RUNNER.invoke(app, ["data", "check", str(path)])
    assert done.exit_code in (0, 1) and isinstance(done.exception, SystemExit | None)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_a_problem(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an empty file passes."""
    (tmp_path / "d.jsonl").write_bytes(content)
    right, found = checked(capsys, tmp_path / "d.jsonl")
    assert not right and found["problems"] == ["file        it holds no rows", ""]


def test_many_problems_are_counted_not_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a file that is wrong throughout scrolls everything else away."""
    path = write_rows(tmp_path / "d.jsonl", *[without("ability")] * 50)
    right, found = checked(capsys, path)
    assert not right and len(found["problems"]) == 22
    assert found["problems"][20].strip() == "and 30 more"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the file to check"), (["gone.parquet"], "gone.parquet: no such file"),
        (["rows.csv"], "must end in .parquet or .jsonl"), (["d.jsonl", "--model", "gone"], "gone"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_said(arguments: list[str], said: str, tmp_path: Path) -> None:
    """Fails if a misspelled name ends in a traceback, or in success."""
    write_rows(tmp_path / "d.jsonl", a_row())
    (tmp_path / "rows.csv").write_text("a")
    given = [str(tmp_path / a) if a[:2] != "--" else a for a in arguments]
    done = RUNNER.invoke(app, ["data", "check", *given])
    assert done.exit_code == 1 and said in done.stderr and "Traceback" not in done.output
