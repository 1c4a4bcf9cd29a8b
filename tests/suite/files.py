"""Benchmark files of a few rows, with pictures of their own, for tests."""

import base64
import csv
import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from r1v3.data.builders import questions
from r1v3.suite.benchmarks.digits import rows_of

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


def emma_rows() -> list[dict[str, Any]]:
    """Three rows of one subject: two of options, one open with two pictures."""
    blank = {f"image_{i}": None for i in range(1, 6)}
    rows = [
        {
            "pid": f"math_{i}",
            "question": "Which is it? <image_1>" + (" or <image_2>" if i == 2 else ""),
            "options": [] if i == 2 else ["1/2", "3/4"],
            "answer": "7" if i == 2 else "B",
            "context": "",
            "subject": "Math",
            "category": "2D",
            "type": "Open-ended" if i == 2 else "Multiple Choice",
            **blank,
            "image_1": {"bytes": picture(i), "path": None},
        }
        for i in range(3)
    ]
    rows[2]["image_2"] = {"bytes": picture(9), "path": None}
    return rows


def mmk12_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": str(i),
            "question": "<image>What is the angle?\nA. 30\nB. 45\nC. 60\nD. 90",
            "answer": "ABCD"[i % 4],
            "subject": ("math", "physics")[i % 2],
            "image": {"bytes": picture(i), "path": "x.png"},
        }
        for i in range(12)
    ]


def question_rows(answers: Sequence[str], question: str = "What is shown?", **more: str) -> Rows:
    """Open questions with these answers about a picture each."""
    return [
        {"index": str(i), "image": encoded(i), "question": question, "answer": answer, **more}
        for i, answer in enumerate(answers)
    ]


def mathvista_rows() -> Rows:
    rows = question_rows(["14", "1.5"] * 3, question_type="free_form", choices="[]", task="FQA")
    for row in rows:
        row |= {"answer_type": "integer", "skills": "['arithmetic reasoning']", "answer_option": ""}
    more = question_rows(
        ["blue"] * 6,
        "Hint: Answer with a letter.\nQuestion: Which?\nChoices:\n(A) red\n(B) blue",
        question_type="multi_choice", choices="['red', 'blue']", answer_option="B", task="VQA",
        skills="['a', 'b']", answer_type="text",
    )  # fmt: skip
    for i, row in enumerate(more):
        row["index"] = str(6 + i)
    return rows + more


def mathverse_rows() -> Rows:
    asked = "Find x.\nChoices:\nA:2\nB:4\nC:6\nD:8"
    metadata = "{'problem_version': 'Vision Only', 'subject': 'Plane', 'subfield': 'Angle'}"
    return question_rows(["B", "C"] * 6, "", question_for_eval=asked, metadata=metadata)


def mathvision_rows() -> Rows:
    rows = question_rows(["2\\sqrt{3}", "14"] * 3, choices="[]", category="counting")
    more = question_rows(["B"] * 6, "<image1> Which?", choices="['1', '2']", category="algebra")
    for i, row in enumerate(more):
        row["index"] = str(6 + i)
    return rows + more


def wemath_rows() -> Rows:
    """Two composites of two steps and one of three, and two rows outside of both."""
    keys = [(name, f"2steps_{part}") for name in ("10", "11") for part in ("1", "2", "multi")]
    keys += [("10", f"3steps_{part}") for part in ("1", "2", "3", "multi")]
    keys += [("99", "other"), ("98", "other")]
    rows = choice_rows(12, "ABC", **{"knowledge concept": "Cubes", "requirement": ""})
    for row, (name, key) in zip(rows, keys, strict=True):
        row |= {"ID": name, "key": key}
    return rows


def visulogic_rows() -> Rows:
    rows = question_rows(["A", "B", "C", "D"] * 3, "Which follows? A, B, C or D.")
    names = ("Quantitative", "Spatial", "Positional", "Attribute", "Stylistic", "Other")
    for i, row in enumerate(rows):
        row["category"] = names[i % 6]
    return rows


def logicvista_rows() -> Rows:
    asked = "Which of these follow?\nA. one\nB. two\nC. three"
    return question_rows(["B", "B, C"] * 6, asked, skill="['inductive', 'spatial']")


def mme_rows() -> Rows:
    rows = question_rows([""] * 12, capability="['calculation']", reasoning_type="['deductive']")
    for row in rows:
        row |= {"question_type": "puzzle", "function_id": "", "prompt_id": "", "special_info": ""}
    for i in range(4):
        rows[i] |= {"question_type": "choice", "answer": ("A", "['A', 'C']")[i % 2]}
        rows[4 + i] |= {"question_type": "open", "answer": "14"}
    rows[8] |= {"function_id": "calculate_answer_function_1"}
    rows[9] |= {
        "function_id": "judge_24points_function",
        "special_info": '{"init_cards": [3, 8, 9, 1]}',
    }
    rows[10] |= {"function_id": "match_answer_function", "answer": '{"A": 5, "B": 1}'}
    rows[11] |= {"function_id": "calculate_answer_function_sudoku_4", "special_info": SUDOKU}
    return rows


SUDOKU = (
    '{"base_matrix": [[1, null, null, 4], [null, 4, 1, null],'
    " [2, 1, null, null], [null, null, null, 1]]}"
)


def phyx_rows() -> Rows:
    asked = "How large is the force?\nA: 1 N\nB: 2 N\nC: 3 N\nD: 4 N"
    rows = question_rows(["A", "B", "C", "D"] * 3, asked)
    for i, row in enumerate(rows):
        row["category"] = ("Mechanics", "Optics", "Electromagnetism")[i % 3]
    return rows


def seephys_rows() -> Rows:
    rows = question_rows(["4.0", "2\\pi"] * 6, level="1", subject="EM")
    for i, row in enumerate(rows):
        row |= {"language": ("English", "Chinese")[i % 2], "sig_figs": ("2", "3.0", "")[i % 3]}
    return rows


def digits_rows() -> Rows:
    """The demo's questions of two domains: one of options, one open."""
    return rows_of(questions("test", ("ordering", "counting"), 12, 0))


FILES: dict[str, Callable[[], Rows]] = {
    "MMMU_DEV_VAL.tsv": mmmu_rows,
    "MMMU_Pro_10c.tsv": lambda: choice_rows(12, "ABCDEFGHIJ"),
    "MMMU_Pro_V.tsv": lambda: question_rows(["A", "J"] * 6, "placeholder", category="Art"),
    "MMStar.tsv": choice_rows,
    "MMBench_DEV_EN_V11.tsv": mmbench_rows,
    "HallusionBench.tsv": hallusion_rows,
    "MathVista_MINI.tsv": mathvista_rows,
    "MathVerse_MINIVOnly.tsv": mathverse_rows,
    "MathVision.tsv": mathvision_rows,
    "WeMath.tsv": wemath_rows,
    "VisuLogic.tsv": visulogic_rows,
    "LogicVista.tsv": logicvista_rows,
    "MME_Reasoning.tsv": mme_rows,
    "PhyX_mini_MC_TM.tsv": phyx_rows,
    "SeePhys_total.tsv": seephys_rows,
    "R1V3_Digits.tsv": digits_rows,
}


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def write_all(folder: Path) -> Path:
    """Every benchmark's file of 12 rows."""
    for name, rows in FILES.items():
        write_tsv(folder / name, rows())
    for subject in ("Chemistry", "Coding", "Math", "Physics"):
        rows = [{**row, "pid": f"{subject}_{i}"} for i, row in enumerate(emma_rows())]
        write_parquet(folder / "EMMA-mini" / subject / "test-00000-of-00001.parquet", rows)
    write_parquet(folder / "MMK12" / "test-00000-of-00001.parquet", mmk12_rows())
    return folder
