"""Benchmark files of a few rows, with pictures of their own, for tests."""

import base64
import csv
import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

Rows = list[dict[str, str]]


@cache
def picture(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG file of random gray."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(seed: int) -> str:
    return base64.b64encode(picture(seed)).decode()


def write_tsv(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Rows as VLMEvalKit's files have them; a cell that a row lacks is blank."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", dialect="excel-tab")
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice_rows(count: int = 12, letters: str = "ABCD", **further: str) -> Rows:
    """Multiple-choice questions about a picture each."""
    return [
        {
            "index": str(i),
            "image": encoded(i),
            "question": f"Which number is shown in picture {i}?",
            **{letter: str(10 * i + n) for n, letter in enumerate(letters)},
            "answer": letters[i % len(letters)],
            "category": ("math", "art")[i % 2],
            **further,
        }
        for i in range(count)
    ]


def mmmu_rows() -> Rows:
    """Ten questions of the validation split, two of them open, and two of the other split."""
    rows = choice_rows(split="validation", **{"l2-category": "Accounting"})
    rows[1] |= {
        "question": "Compare <image 2> and <image 1>.",
        "image": f"['{encoded(1)}', '{encoded(2)}']",
    }
    for i in (2, 3):
        rows[i] |= {letter: "" for letter in "ABCD"} | {"answer": "14", "question": "How many?"}
    for i in (10, 11):
        rows[i]["split"] = "dev"
    return rows


def mmbench_rows() -> Rows:
    """Three questions of four options, in all rotations; rotated rows refer to a picture."""
    rows = []
    for rotation in range(4):
        for i in (5, 6, 7):
            letters = "ABCD"[rotation:] + "ABCD"[:rotation]
            rows.append(
                {
                    "index": str(i + rotation * 1_000_000),
                    "image": str(i) if rotation else encoded(i),
                    "question": "Which <b>one</b> is it?",
                    "hint": "Look at the picture." if i == 5 else "",
                    **{letter: str(n) for n, letter in enumerate(letters)},
                    "answer": letters[i % 4],
                    "category": "color",
                    "l2-category": "perception",
                }
            )
    return rows


def hallusion_rows() -> Rows:
    """Two sets of two figures and three questions."""
    return [
        {
            "index": f"set_VD_chart_{group}_{figure}_{asked}",
            "image": encoded(figure),
            "question": "Is the first bar the longest?",
            "answer": ("Yes", "No")[(figure + asked) % 2],
            "category": "VD",
            "l2-category": "chart",
        }
        for group in (0, 1)
        for figure in (1, 2)
        for asked in (0, 1, 2)
    ]


FILES: dict[str, Callable[[], Rows]] = {
    "MMMU_DEV_VAL.tsv": mmmu_rows,
    "MMStar.tsv": choice_rows,
    "MMBench_DEV_EN_V11.tsv": mmbench_rows,
    "HallusionBench.tsv": hallusion_rows,
}


def write_all(folder: Path) -> Path:
    """Every benchmark's file of 12 rows."""
    for name, rows in FILES.items():
        write_tsv(folder / name, rows())
    return folder
