"""Whether a run has ended well, read off what its stage left."""

from typing import Any

from r1v3.config import modes_of
from r1v3.files import read_json_object
from r1v3.study.plan import Run
from r1v3.trainer.record import record_path

TRAINING = ("sft", "grpo", "connector")


def finished(run: Run) -> bool:
    """Whether everything that the run was to leave is there."""
    if run.verb in TRAINING:
        record = _read(record_path(run.verb, run.folder))
        model = run.folder / "models" / run.verb
        return record.get("trained") is not None and model.is_dir()
    if run.verb == "eval":
        answers = _read(run.folder / "evaluation" / f"{run.config.name}.json").get("answers", {})
        return all(mode in answers for mode in modes_of(run.config))
    if run.verb == "select":
        left = (run.folder / "selection.json", run.folder / "models" / "selected")
        return all(path.exists() for path in left)
    folder = run.folder / "data"
    known = _read(folder / "statistics.json")
    built = {path.stem for path in folder.glob("*.parquet")}
    return all(name in known and name in built for name in wanted_data(run.config))


def begun(run: Run) -> bool:
    """Whether the stage is to go on and not to start; only training stages make a difference."""
    return run.verb in TRAINING and (run.folder / "config" / f"{run.verb}.yaml").is_file()


def wanted_data(config: Any) -> list[str]:
    """The datasets that a data stage builds."""
    counts = {name: value for name, value in config if isinstance(value, int)}
    return [name for name, count in counts.items() if count and name not in ("seed", "tries")]


def _read(path: Any) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}
