"""One sample: its properties, and every way in which a row can be wrong."""

import base64
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from r1v3.data.sample import Sample, make_sample
from r1v3.data.schema import load_samples
from tests.data.sample_rows import a_row, png, some_samples, without, write_rows


def test_properties() -> None:
    """Properties of a sample that trainers and rewards read."""
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


WRONG_ROWS: dict[str, tuple[Any, str]] = {
    "missing source": (without("data_source"), "data_source: Field required"),
    "missing prompt": (without("prompt"), "prompt: Field required"),
    "missing reward": (without("reward_model"), "reward_model: Field required"),
    "missing extra": (without("extra_info"), "extra_info: Field required"),
    "missing index": (a_row(extra_info={"split": "x"}), "extra_info.index: Field required"),
    "missing truth": (a_row(reward_model={"style": "rule"}), "reward_model.ground_truth: Field"),
    "list as truth": (
        a_row(reward_model={"style": "rule", "ground_truth": ["3"]}),
        "reward_model.ground_truth: Input should be a valid string",
    ),
    "truth value as truth": (
        a_row(reward_model={"style": "rule", "ground_truth": True}),
        "reward_model.ground_truth: Input should be a valid string",
    ),
    "number as style": (
        a_row(reward_model={"style": 1, "ground_truth": "3"}),
        "reward_model.style: Input should be a valid string",
    ),
    "fraction as index": (
        a_row(extra_info={"split": "x", "index": 0.5}),
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
    "misspelled images": (
        {**without("images"), "imges": ["a.png"]},
        "1 <image> placeholders and images has 0",
    ),
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
    "images as number": (a_row(images=7), "images: must be a list, not int"),
    "missing single image": (a_row(images="a.png"), "images[0]: path 'a.png' is not a file"),
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


def test_every_fault_of_a_row_is_listed(tmp_path: Path) -> None:
    """Fixing one key per attempt is tedious."""
    row = {key: value for key, value in a_row().items() if key not in ("ability", "data_source")}
    with pytest.raises(ValueError, match="data_source: Field required; ability: Field required"):
        load_samples(write_rows(tmp_path / "d.jsonl", row))


def test_further_keys_must_be_json() -> None:
    """Found when a sample is made, not an hour later when it is written."""
    for value in (float("nan"), {1, 2}, b"bytes"):
        with pytest.raises(ValueError, match="JSON"):
            make_sample(question="q", ground_truth="1", data_source="t", index=0, note=value)
