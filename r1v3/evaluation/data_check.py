"""`r1v3 data check`: prints what stages will read of files of rows, and what is wrong with them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from r1v3.config import Pictures
from r1v3.data.check import FileCheck, ModelLimits, check_file
from r1v3.data.encoding import model_image_shape
from r1v3.data.lengths import PositionLimit
from r1v3.data.rows import USED_COLUMNS
from r1v3.data.sample import Sample
from r1v3.data.tiles import ImageShape
from r1v3.data.tokenizer import load_tokenizer
from r1v3.files import human_bytes
from r1v3.model.conversion import load_config
from r1v3.progress import say

SHOWN_PROBLEMS = 20
SHOWN_VALUES = 5
SHOWN_TEXT = 200
_PERCENTILES = (50, 90, 99)


def check_files(
    files: Sequence[Path],
    *,
    model: Path | None = None,
    max_tiles: int | None = None,
    truncated: Literal["error", "accept", "skip"] = "error",
) -> bool:
    """Check files and print the account of each; return whether every row is right.

    Args:
        model: folder of the model whose tiles and tokens count; without one, InternVL3's tiles.
        max_tiles, truncated: as in a stage.

    Raises:
        ValueError: no file is given, or one cannot be read.
    """
    if not files:
        raise ValueError("name the file to check: r1v3 data check FILE")
    pictures, limits = Pictures(truncated=truncated), None
    shape = ImageShape(448, max_tiles or 12, 256, pictures=pictures)
    if model is not None:
        config = load_config(model)
        shape = model_image_shape(config, max_tiles, pictures)
        limits = ModelLimits(load_tokenizer(model), PositionLimit.of(config, "error"))
    right = True
    for file in files:
        check = check_file(file, shape, limits)
        for line in report_lines(file, check, shape, model):
            say(line)
        right = right and not check.problems
    return right


def report_lines(file: Path, check: FileCheck, shape: ImageShape, model: Path | None) -> list[str]:
    """The account of a file, in aligned lines."""
    sections = {
        "columns": _columns(check),
        "rows": _rows(check),
        "pictures": _pictures(check, shape, model),
        "tokens": _tokens(check),
        "sample": [] if check.first is None else _sample(*check.first),
        "problems": _problems(check),
    }
    lines = [f"{file}: {_count(check.rows, 'row')}, {human_bytes(file.stat().st_size)}"]
    for title, entries in sections.items():
        for i, (name, text) in enumerate(entries):
            if i == 0:
                lines.append("")
            lines.append(f"{title if i == 0 else '':<10}{name:<12}{text}".rstrip())
    return [*lines, "", _verdict(check)]


Entries = list[tuple[str, str]]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _most_common(values: Counter[str]) -> str:
    """`geo 1,000, maze 234 and 3 more`."""
    shown = [f"{_short(value, 40)} {count:,}" for value, count in values.most_common(SHOWN_VALUES)]
    more = len(values) - SHOWN_VALUES
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def _short(text: str, most: int = SHOWN_TEXT) -> str:
    """One printable line of a text that is not trusted."""
    line = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _verdict(check: FileCheck) -> str:
    if check.problems:
        return f"{_count(len(check.problems), 'problem')} in {_count(check.rows, 'row')}"
    if check.left_out:
        return f"{_count(check.left_out, 'row')} will be left out; every other one can be read"
    return "every row can be read"


def _columns(check: FileCheck) -> Entries:
    entries = [("read", ", ".join(USED_COLUMNS))]
    if check.columns:
        entries.append(("kept", ", ".join(_short(name, 40) for name in check.columns)))
    if check.extra_keys:
        names = ", ".join(_short(name, 40) for name in check.extra_keys)
        entries.append(("kept", f"extra_info: {names}"))
    entries += [
        ("ignored", f"{_short(what)}, {_count(rows, 'row')}")
        for what, rows in check.ignored.items()
    ]
    return entries


def _rows(check: FileCheck) -> Entries:
    if check.first is None:
        return []
    names = ("data_source", "split", "domain", "ability")
    entries = [(n, _most_common(check.values[n])) for n in names if n in check.values]
    has = check.values["has"]
    if has["options"]:
        entries.append(("options", f"in {_count(has['options'], 'row')}"))
    needed = " (supervised stages need one in every row)"
    if has["response"]:
        every = has["response"] == check.rows
        entries.append(
            ("response", f"in {_count(has['response'], 'row')}{'' if every else needed}")
        )
    else:
        entries.append(("response", f"none{needed}"))
    return entries


def _pictures(check: FileCheck, shape: ImageShape, model: Path | None) -> Entries:
    total = check.formats.total()
    if not total:
        return [("none", "")] if check.first is not None else []
    rows = _count(check.values["has"]["images"], "row")
    entries = [
        ("number", f"{total:,} in {rows}, at most {check.most_pictures} in one"),
        ("kinds", _most_common(check.formats)),
    ]
    if check.sizes:
        by_area = sorted(check.sizes, key=lambda size: size[0] * size[1])
        least, middle, most = (
            "{} x {}".format(*by_area[i]) for i in (0, len(by_area) // 2, len(by_area) - 1)
        )
        entries.append(("pixels", f"{least} to {most}, median {middle}"))
        tiles = np.array(check.tiles)
        thumbnail = " and a thumbnail" if shape.thumbnail and shape.max_tiles > 1 else ""
        whose = "InternVL3's; --model counts another's" if model is None else str(model)
        entries.append(
            ("tiles", f"{tiles.min()} to {tiles.max()} each, {tiles.mean():.1f} on average")
        )
        entries.append(
            ("", f"of {shape.tile_size} pixels, at most {shape.max_tiles}{thumbnail} ({whose})")
        )
    meanings = {
        "transparent": f"laid on {shape.pictures.ground}",
        "of more than 8 bits": "scaled to 8",
        "turned": "to their EXIF orientation",
        "of several frames": "the first is shown",
        "truncated": {"skip": "their rows are left out", "accept": "padded"}.get(
            shape.pictures.truncated, "an error"
        ),
    }
    notes = [f"{n:,} {what} ({meanings[what]})" for what, n in check.notes.items()]
    return entries + [("of these", note) for note in notes]


def _tokens(check: FileCheck) -> Entries:
    entries = []
    for name, found in {
        "prompt": check.prompt_tokens,
        "response": check.response_tokens,
    }.items():
        if not found:
            continue
        counts = np.array([count for count, _ in found])
        marks = np.percentile(counts, _PERCENTILES, method="higher")
        shown = [f"{p} % {mark:,}" for p, mark in zip(_PERCENTILES, marks, strict=True)]
        most, place = max(found, key=lambda one: one[0])
        entries.append((name, f"{'   '.join(shown)}   most {most:,} ({place})"))
    return entries


def _sample(place: str, sample: Sample) -> Entries:
    entries: Entries = [("row", place)]
    entries += [(message["role"], _short(message["content"])) for message in sample.prompt]
    if sample.options:
        entries.append(("options", _short(", ".join(sample.options))))
    entries.append(("truth", _short(sample.ground_truth)))
    if sample.response:
        entries.append(("response", _short(sample.response)))
    return entries


def _problems(check: FileCheck) -> Entries:
    entries = [(place, _short(reason)) for place, reason in check.problems[:SHOWN_PROBLEMS]]
    if (more := len(check.problems) - SHOWN_PROBLEMS) > 0:
        entries.append(("", f"and {more:,} more"))
    return entries
