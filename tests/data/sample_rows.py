"""Rows and samples that the tests of sample files share."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from r1v3.data.sample import Sample, make_sample


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


def without(key: str) -> dict[str, Any]:
    row = a_row()
    del row[key]
    return row
