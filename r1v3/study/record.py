"""The record of a study: every run, every seed, every score, every finding, as plain values."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1v3.config import modes_of
from r1v3.study.collapse import collapse_step
from r1v3.study.finished import finished
from r1v3.study.measures import evaluation, mode_score, questions_of, series
from r1v3.study.plan import Place, Plan, Run
from r1v3.study.runner import seconds_of
from r1v3.study.verdicts import find_all

_TRENDS = ("reward", "response_length", "entropy", "repetition", "grad_norm")


def make_record(
    plan: Plan, out: Path, *, quick: bool, environment: dict[str, Any]
) -> dict[str, Any]:
    """Collect what a study's runs left, as JSON.

    `seconds` and `environment` aside, a study that was killed and run again gives the same.
    """
    labels = plan.labels()
    return {
        "name": plan.name,
        "title": plan.study.title,
        "report": plan.study.report,
        "quick": quick,
        "seeds": list(plan.study.seeds),
        "findings": [asdict(one) for one in find_all(plan)],
        "scores": _scores(plan),
        "training": _training(plan),
        "runs": [
            {
                "key": key,
                "verb": run.verb,
                "folder": str(run.folder),
                "needs": list(run.needs),
                "places": labels[key],
                "finished": finished(run),
            }
            for key, run in plan.runs.items()
        ],
        "seconds": {key: seconds_of(out, key) for key in plan.runs},
        "environment": environment,
        "study": plan.study.model_dump(mode="json"),
    }


def _places(plan: Plan, verb: str) -> list[tuple[Place, Run]]:
    """Places of a verb's runs, each run once, by its first place."""
    found: dict[str, Place] = {}
    for place, key in plan.places.items():
        if plan.runs[key].verb == verb:
            found.setdefault(key, place)
    return [(place, plan.runs[key]) for key, place in found.items()]


def _scores(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    for place, run in _places(plan, "eval"):
        record = evaluation(run)
        if "questions" not in record:
            continue
        kinds = ["in_domain", "out_of_domain"]
        kinds += sorted({str(one) for one in record["questions"]["difficulty"] if one is not None})
        for mode in modes_of(run.config):
            for where in kinds:
                if where == "out_of_domain" and not _has(run, where):
                    continue
                found = mode_score(run, mode, where)
                if found is not None:
                    rows.append(asdict(place) | {"mode": mode, "where": where} | asdict(found))
    return rows


def _has(run: Run, where: str) -> bool:
    try:
        return bool(questions_of(run, where).any())
    except ValueError:
        return False


def _training(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    for place, run in _places(plan, "grpo"):
        _, rewards = series(run, "reward")
        if not rewards:
            continue
        row: dict[str, Any] = asdict(place) | {"steps": len(rewards)}
        for key in _TRENDS:
            _, values = series(run, key)
            fifth = max(1, len(values) // 5)
            if values:
                row[f"{key}_first"] = sum(values[:fifth]) / fifth
                row[f"{key}_last"] = sum(values[-fifth:]) / fifth
        row["collapse_step"] = collapse_step(rewards)
        rows.append(row)
    return rows
