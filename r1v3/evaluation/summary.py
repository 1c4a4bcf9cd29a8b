"""Scores of all stages of a run and the gain of each, in one file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from r1v3.data.tokenizer import load_tokenizer
from r1v3.evaluation.statistics import paired_gain
from r1v3.files import write_json
from r1v3.model.internvl import count_parameters, load_model

EVALUATED = ("base", "sft", "grpo", "connector", "selected")


def summarize(run: Path, seed: int, base: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Collect the evaluation records of a run in summary.json; return its content."""
    records = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in (run / "evaluation").glob("*.json")
    }
    stages = {
        name: {"checkpoint": records[name]["checkpoint"], "modes": records[name]["modes"]}
        for name in EVALUATED
        if name in records
    }
    inside = _in_domain_questions(run)
    gains = {}
    for later, earlier in (("grpo", "sft"), ("connector", "grpo"), ("selected", "grpo")):
        if all("correct" in records.get(name, {}) for name in (later, earlier)):
            before = np.array(records[earlier]["correct"])[inside]
            after = np.array(records[later]["correct"])[inside]
            gains[f"{later}_minus_{earlier}"] = asdict(paired_gain(before, after))
    summary = {
        "seed": seed,
        "base": str(base),
        "stages": stages,
        "gain": gains,
        "seconds": seconds,
        "vocabulary": len(load_tokenizer(base)),
        "parameters": count_parameters(load_model(base)),
    }
    write_json(run / "summary.json", summary)
    return summary


def _in_domain_questions(run: Path) -> np.ndarray:
    """Mask [Q] of the questions that are in domain: they come first, in file order."""
    counts = json.loads((run / "data" / "statistics.json").read_text(encoding="utf-8"))
    inside = counts["test_in_domain"]["samples"]
    outside = counts.get("test_out_of_domain", {}).get("samples", 0)
    return np.arange(inside + outside) < inside
