"""A run folder in the layout that the stages write, with the curves of a plausible small run."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from r1v3.evaluation.statistics import paired_gain, score

VOCABULARY = 64
CONFIG = """\
seed: 0
model:
  hidden_size: 96
sft:
  steps: 120
  learning_rate: 0.003
grpo:
  steps: 60
  group_size: 8
"""
WORDS = (
    "<think> the first digit is 7 and the second is 5 . Wait , check again . 7 - 5 = 2"
    " </think> \\boxed{ 2 }"
)


def _outcomes(
    rng: np.random.Generator, accuracy: float, questions: int, samples: int
) -> np.ndarray:
    ability = rng.beta(4 * accuracy, 4 * (1 - accuracy), size=(questions, 1))
    return (rng.random((questions, samples)) < ability).astype(int)


def _score(rng: np.random.Generator, accuracy: float, tokens: float, questions: int) -> dict:
    correct = _outcomes(rng, accuracy, questions, 4)
    return vars(score(correct, rng.poisson(tokens, correct.shape)))


def _mode(rng: np.random.Generator, accuracy: float, tokens: float) -> dict:
    return {
        "in_domain": _score(rng, accuracy, tokens, 200),
        "out_of_domain": _score(rng, 0.7 * accuracy, tokens, 100),
        "domains": {
            name: _score(rng, accuracy, tokens, 50) for name in ("sum", "difference", "largest")
        },
    }


def _summary(rng: np.random.Generator) -> dict:
    stages = {
        name: {"checkpoint": f"checkpoints/{name}", "modes": {"slow": _mode(rng, accuracy, tokens)}}
        for name, accuracy, tokens in (
            ("base", 0.02, 50.0),
            ("sft", 0.76, 38.6),
            ("grpo", 0.86, 43.9),
            ("connector", 0.87, 43.5),
            ("selected", 0.85, 43.0),
        )
    }
    modes = stages["connector"]["modes"]
    assert isinstance(modes, dict)
    modes["nothink"] = _mode(rng, 0.11, 9.7)
    modes["nowait"] = _mode(rng, 0.80, 32.9)
    for budget, accuracy in ((8, 0.05), (16, 0.08), (24, 0.17), (32, 0.3), (48, 0.62), (64, 0.85)):
        modes[f"budget-{budget}"] = _mode(rng, accuracy, budget + 4.0)
    before = _outcomes(rng, 0.76, 200, 4)
    after = np.maximum(before, _outcomes(rng, 0.4, 200, 4))
    return {
        "seed": 0,
        "base": None,
        "stages": stages,
        "gain": {"grpo_minus_sft": vars(paired_gain(before, after))},
        "seconds": {"data": 4.1, "sft": 96.4, "grpo": 201.7, "connector": 22.3, "eval": 61.0},
        "vocabulary": VOCABULARY,
        "parameters": {"vision": 218_000, "connector": 47_000, "llm": 334_904},
    }


def _supervised(rng: np.random.Generator, steps: int, first: float, last: float) -> list[dict]:
    lines = []
    for step in range(1, steps + 1):
        level = last + (first - last) * math.exp(-5 * step / steps)
        line = {
            "step": step,
            "loss": level * float(rng.lognormal(0, 0.06)),
            "learning_rate": 3e-3,
            "grad_norm": 1.0,
            "tokens": 2400,
        }
        if step % (steps // 6) == 0:
            line["validation_loss"] = level * 1.05
        lines.append(line)
    return lines


def _grpo(rng: np.random.Generator, steps: int, edges: np.ndarray) -> list[dict]:
    lines: list[dict] = []
    for step in range(1, steps + 1):
        done = step / steps
        accuracy = 0.76 + 0.11 * done + float(rng.normal(0, 0.02))
        entropies = np.minimum(rng.exponential(0.10 - 0.04 * done, 9000), math.log(VOCABULARY))
        entropies[:600] = rng.normal(1.25 - 0.1 * done, 0.2, 600).clip(0, math.log(VOCABULARY))
        line = {
            "step": step,
            "reward": 0.8 * accuracy + 0.2 * 0.99,
            "accuracy": accuracy,
            "format": 0.99,
            "response_length": 38.6 + 5.3 * done + float(rng.normal(0, 0.6)),
            "entropy": float(entropies.mean()),
            "critical_entropy": 1.38 - 0.14 * done,
            "critical_entropy_after": 0.05 + 0.04 * done,
            "high_entropy_share": 0.0,
            "entropy_histogram": np.histogram(entropies, edges)[0].tolist(),
            "grad_norm_vision": float(rng.lognormal(-2.2, 0.3)),
            "grad_norm_connector": float(rng.lognormal(-2.9, 0.3)),
            "grad_norm_llm": float(rng.lognormal(-1.0, 0.3)),
            "truncated": 0.04 * (1 - done),
            "approx_kl": None,
        }
        if step % (steps // 5) == 0:
            line |= {"validation_accuracy": accuracy, "validation_low": accuracy - 0.03}
            line |= {"validation_high": accuracy + 0.03}
        lines.append(line)
    return lines


def _selection(grpo: list[dict]) -> dict:
    found = [line for line in grpo if "validation_accuracy" in line]
    entries = [
        {
            "name": f"step-{line['step']}",
            **{
                key: line[key] for key in line if key.startswith(("step", "critical", "validation"))
            },
            "selected": i == 3,
        }
        for i, line in enumerate(found)
    ]
    return {"checkpoints": entries, "rule": "highest critical-token entropy of the last three"}


def _image(rng: np.random.Generator, file: Path) -> None:
    digits = load_digits().images
    row = np.concatenate([digits[i] for i in rng.integers(0, len(digits), 3)], axis=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 - 15 * row).astype(np.uint8)).resize((96, 32)).save(file)


def _transcripts(rng: np.random.Generator, root: Path, stage: str, right: list[bool]) -> list[dict]:
    entries = []
    for i, correct in enumerate(right):
        image = root / "images" / f"{i}.png"
        if not image.exists():
            _image(rng, image)
        tokens = [
            {
                "text": f"{word} ",
                "entropy": float(rng.exponential(0.9 if word == "Wait" else 0.15)),
                "critical": word == "Wait",
            }
            for word in WORDS.split(" ")
        ]
        entries.append(
            {
                "question": f"<image>\nWhat is the first digit minus the second? ({i})",
                "options": ["A. 1", "B. 2"] if i % 2 else None,
                "image": f"images/{i}.png",
                "ground_truth": "2",
                "mode": "slow",
                "response": WORDS,
                "correct": correct,
                "tokens": tokens,
                "stage": stage,
            }
        )
    return entries


def write_example_run(root: Path, seed: int = 0) -> Path:
    """Write every file of a finished run under `root`; the same seed writes the same numbers."""
    rng = np.random.default_rng(seed)
    edges = np.linspace(0, 8, 41)
    grpo = _grpo(rng, 60, edges)
    (root / "metrics").mkdir(parents=True)
    (root / "transcripts").mkdir()
    lines = {
        "sft": _supervised(rng, 120, 4.0, 0.2),
        "grpo": grpo,
        "connector": _supervised(rng, 30, 0.30, 0.22),
    }
    for name, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (root / "metrics" / f"{name}.jsonl").write_text(text)
    environment = {
        "machine": "x86_64 Linux",
        "cpu": "Example CPU",
        "cores": 2,
        "memory_gib": 7.6,
        "python": "3.12.4",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "commit": "0123abc",
        "started": "2026-01-02T03:04:05Z",
    }
    answers = {"sft": [False, True, False, True], "grpo": [True, True, False, True]}
    transcripts = {s: _transcripts(rng, root, s, right) for s, right in answers.items()}
    for name, value in {
        "environment": environment,
        "summary": _summary(rng),
        "selection": _selection(grpo),
        "metrics/entropy_histogram_edges": edges.tolist(),
        **{f"transcripts/{stage}": entries for stage, entries in transcripts.items()},
    }.items():
        (root / f"{name}.json").write_text(json.dumps(value))
    (root / "config.yaml").write_text(CONFIG)
    (root / "config").mkdir()
    (root / "config" / "grpo.yaml").write_text("monitor:\n  high_entropy_nats: 6.8\n")
    return root


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, shared by all tests: not to be changed."""
    return write_example_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def example_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, private to one test."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
