"""A study of small configurations whose runs need not be run: their results are written by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from r1v3.config import Study
from r1v3.config.loading import checked
from r1v3.study.plan import Plan, Run, make_plan

CONFIGS = {
    "data": {"run": "run", "grpo": 4, "test_in_domain": 30},
    "sft": {
        "run": "run",
        "model": "base",
        "train_data": "{run}/data/sft.parquet",
        "validation_data": "{run}/data/sft_validation.parquet",
        "optimizer": {"learning_rate": 0.001},
    },
    "grpo": {
        "run": "run",
        "model": "{run}/models/sft",
        "train_data": "{run}/data/grpo.parquet",
        "validation_data": "{run}/data/grpo_validation.parquet",
        "steps": 20,
        "optimizer": {"learning_rate": 0.001},
    },
    "select": {"run": "run"},
    "eval": {
        "run": "run",
        "model": "{run}/models/grpo",
        "data": ["{run}/data/test_in_domain.parquet"],
        "out_of_domain": ["counting"],
        "samples": 2,
    },
}
FILES = {"train_data": "{data}/data/a.parquet", "validation_data": "{data}/data/b.parquet"}
TREE: dict[str, Any] = {
    "title": "A study",
    "report": "says so",
    "seeds": [0, 1],
    "stages": {
        "data": {"verb": "data", "config": "data.yaml"},
        "sft": {"verb": "sft", "config": "sft.yaml", "settings": FILES},
        "grpo": {
            "verb": "grpo",
            "config": "grpo.yaml",
            "settings": FILES | {"model": "{sft}/models/sft"},
        },
        "score": {
            "verb": "eval",
            "config": "eval.yaml",
            "settings": {
                "model": "{grpo}/models/grpo",
                "data": ["{data}/data/test_in_domain.parquet"],
            },
        },
    },
    "arms": {"default": {}, "hot": {"grpo": {"optimizer.learning_rate": 0.01}}},
    "measure": ["score"],
}


def planned(**changes: Any) -> Plan:
    """A plan of `TREE` with other keys."""
    return make_plan("mine", checked(Study, TREE | changes, "mine.yaml"), Path("out"))


def write_answers(run: Run, modes: dict[str, dict[str, np.ndarray]], domains: list[str]) -> None:
    """Write the record of an evaluation."""
    file = run.folder / "evaluation" / f"{run.config.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    answers = {
        mode: {key: value.tolist() for key, value in measures.items()}
        for mode, measures in modes.items()
    }
    facts = {"domain": domains, "difficulty": [None] * len(domains)}
    file.write_text(json.dumps({"answers": answers, "questions": facts, "modes": {}}))


def write_metrics(run: Run, lines: list[dict[str, Any]]) -> None:
    """The metrics of a training run."""
    file = run.folder / "metrics" / f"{run.verb}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps({"step": n, **line}) + "\n" for n, line in enumerate(lines, 1))
    )


def finding(**changes: Any) -> dict[str, Any]:
    """A finding of an arm `hot`, as the file of a study has it."""
    return {
        "claim": "hot is | better",
        "report": "76 against 70 %",
        "this": {"stage": "score", "arm": "hot"},
        "than": {"stage": "score"},
        "expect": "higher",
    } | changes
