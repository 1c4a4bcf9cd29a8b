"""The metrics of a stage as a run of Weights & Biases."""

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1v3.files import write_json


class WandbRun:
    """One run of a project, which a resumed stage continues.

    Its id is kept in `<run>/metrics/<stage>.wandb.json`. wandb's own settings, such as
    WANDB_MODE=offline, work as always. Steps that are repeated after a resume are sent again under
    the same step.

    Args:
        project: name of the project.
        run_dir: folder of the r1v3 run; wandb keeps its files in it.
        stage: name of the stage.
        resuming: continue the run of the stored id instead of a new one.
    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, run_dir: Path, stage: str, *, resuming: bool) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"wandb_project is {project!r} but wandb is not installed: "
                "pip install 'r1v3[wandb]', or leave wandb_project out"
            ) from error
        path = run_dir / "metrics" / f"{stage}.wandb.json"
        self._run: Any = wandb.init(
            project=project,
            name=f"{run_dir.name}-{stage}",
            id=_id(path, resuming),
            resume="allow",
            dir=str(run_dir),
        )
        # wandb's own counter refuses steps that come again after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the finite numbers of a step; lists are only in the metrics file."""
        numbers = {
            key: float(value)
            for key, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._run.log({"step": step, **numbers})

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


def _id(path: Path, resuming: bool) -> str:
    if resuming and path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = uuid.uuid4().hex[:12]
    write_json(path, {"id": identity})
    return identity
