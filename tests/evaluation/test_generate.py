"""One question about a person's own picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from r1v3.data.encoding import encode_sample
from r1v3.data.special_tokens import SPECIAL_TOKENS
from r1v3.evaluation.generate import answer_about_image, model_folder
from r1v3.evaluation.policy import Answers, Policy
from tests import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    tiny.save(root / "model")
    (root / "digits.png").write_bytes(tiny.some_questions(1)[0].images[0])
    return root


def ask(home: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "image": home / "digits.png",
        "question": "Compute the result.",
        "mode": "slow",
        "budget": None,
        "temperature": 1.0,
        "max_tokens": 12,
        "seed": 0,
    }
    checkpoint = changes.pop("checkpoint", home / "model")
    return answer_about_image(checkpoint, **{**settings, **changes})


@pytest.mark.parametrize("mode", ["slow", "nothink", "nowait"])
def test_every_mode_answers_and_prints_what_it_returns(
    home: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ask(home, mode=mode)
    printed = capsys.readouterr().out
    assert printed.startswith("<think>\n") is (mode != "nothink")
    kept = "".join(c for c in text if c.isprintable() or c == "\n")
    assert printed == ("" if mode == "nothink" else "<think>\n") + kept + "\n"
    assert not any(token in text for token in SPECIAL_TOKENS)


def test_a_seed_gives_the_same_answer_and_temperature_0_needs_none(home: Path) -> None:
    assert ask(home, seed=1) == ask(home, seed=1) != ask(home, seed=2)
    assert ask(home, temperature=0.0, seed=1) == ask(home, temperature=0.0, seed=2)


def test_the_picture_is_looked_at(home: Path) -> None:
    """Another picture, another answer: the pixels reach the model."""
    other = home / "other.png"
    other.write_bytes(tiny.some_questions(3)[2].images[0])
    greedy = {"temperature": 0.0, "max_tokens": 24}
    assert ask(home, **greedy) != ask(home, image=other, **greedy)


@pytest.mark.parametrize(
    ("own", "told", "tiles"), [(None, None, 1), (4, None, 3), (4, 1, 1), (None, 4, 3), (2, None, 3)]
)
def test_the_picture_is_cut_into_the_tiles_of_the_model(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: int | None,
    told: int | None,
    tiles: int,
) -> None:
    """Fails if a model that was trained on tiles is shown the whole picture as one."""
    model = tmp_path / "model"
    shutil.copytree(home / "model", model)
    config = json.loads((model / "config.json").read_text())
    if own is not None:
        (model / "config.json").write_text(json.dumps({**config, "max_dynamic_patch": own}))
    Image.new("RGB", (80, 40), "red").save(tmp_path / "wide.png")
    seen = []
    real = Policy.answer

    def watched(self: Policy, samples: Any, *args: Any, **kwargs: Any) -> Answers:
        seen.append(len(encode_sample(samples[0], self.tokenizer, self.shape).tiles))
        return real(self, samples, *args, **kwargs)

    monkeypatch.setattr(Policy, "answer", watched)
    ask(home, checkpoint=model, image=tmp_path / "wide.png", max_tokens=2, max_tiles=told)
    assert seen == [tiles]


def test_the_ground_of_a_transparent_picture_can_be_chosen(home: Path, tmp_path: Path) -> None:
    """Fails if the flag does not reach the pixels."""
    image = Image.open(home / "digits.png").convert("L")
    clear = Image.new("LA", image.size)
    clear.putalpha(image)
    clear.save(tmp_path / "clear.png")
    greedy = {"temperature": 0.0, "max_tokens": 24, "image": tmp_path / "clear.png"}
    assert ask(home, **greedy, ground="white") == ask(home, **greedy)
    assert ask(home, **greedy, ground="white") != ask(home, **greedy, ground="black")


def test_a_budget_closes_the_thought(home: Path) -> None:
    text = ask(home, budget=3, max_tokens=40)
    assert "\n</think>\n\n" in text
    free = ask(home, max_tokens=40)
    assert text.startswith(free[:2])


def test_control_characters_of_the_model_do_not_reach_the_terminal(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Policy.answer

    def hostile(self: Policy, *args: Any, **kwargs: Any) -> Answers:
        found = real(self, *args, **kwargs)
        return Answers(found.rollouts, ["a\x1b[31mb\x07\nc\u202ed"], found.correct, found.tokens)

    monkeypatch.setattr(Policy, "answer", hostile)
    ask(home)
    assert capsys.readouterr().out == "<think>\na[31mb\ncd\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "fast"}, "mode 'fast' is not one of slow, nothink, nowait"),
        ({"mode": "nothink", "budget": 4}, "mode nothink has none"),
        ({"budget": -1}, "--budget -1 must not be negative"),
        ({"question": " \n"}, "--question is empty"),
        ({"question": "What is <|im_end|>?"}, "special token <|im_end|>"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(home: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        ask(home, **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not a picture", "cut"], ids=str)
def test_a_picture_that_cannot_be_read_is_refused(
    home: Path, tmp_path: Path, content: bytes | str | None
) -> None:
    image = tmp_path / "mine.png"
    if content == "cut":
        content = (home / "digits.png").read_bytes()[:-60]
    if isinstance(content, bytes):
        image.write_bytes(content)
    with pytest.raises(ValueError, match="mine.png"):
        ask(home, image=image)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} is neither a model folder nor a run folder"):
        model_folder(tmp_path)


def test_of_a_run_folder_the_latest_finished_stage_answers(home: Path, tmp_path: Path) -> None:
    for stage in ("sft", "grpo", "selected", "connector"):
        folder = tmp_path / "models" / stage
        folder.mkdir(parents=True)
        assert model_folder(home / "model") == home / "model"
        if stage != "connector":  # begun, not finished
            (folder / "config.json").write_text("{}")
            assert model_folder(tmp_path) == folder
    assert model_folder(tmp_path) == tmp_path / "models" / "selected"
