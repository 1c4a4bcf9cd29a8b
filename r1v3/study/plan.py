"""The runs of a study: each once, whoever needs it, named by a hash of all that it depends on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1v3.config import STAGES, ConfigError, Stage, Study, load
from r1v3.files import json_text
from r1v3.trainer.record import folder_digest

_OWN = "<run>"
_HASH_DIGITS = 10


@dataclass(frozen=True)
class Place:
    """Where a run stands in a study; `stage` is `<name>@<step>` where it runs for checkpoints."""

    arm: str
    seed: int
    stage: str


@dataclass(frozen=True)
class Run:
    """A stage with its settings resolved.

    Attributes:
        key: `<verb>-<hash>`.
        folder: its run folder. That of `select` is the one of the run that it selects from.
        file: where its resolved configuration is written.
        needs: the keys of the runs that come first.
    """

    key: str
    verb: str
    config: Any
    folder: Path
    file: Path
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The runs of a study in an order in which they can be run, and where each one stands."""

    name: str
    study: Study
    runs: dict[str, Run]
    places: dict[Place, str]

    def run(self, arm: str, seed: int, stage: str) -> Run:
        """The run at a place."""
        return self.runs[self.places[Place(arm, seed, stage)]]

    def labels(self) -> dict[str, list[str]]:
        """`<stage>, <arm>, seed <seed>` of every place of each run, by its key."""
        found: dict[str, list[str]] = {key: [] for key in self.runs}
        for place, key in self.places.items():
            found[key].append(f"{place.stage}, {place.arm}, seed {place.seed}")
        return found


def make_plan(name: str, study: Study, out: Path) -> Plan:
    """Resolve every run of a study whose runs lie in `out`/runs.

    Raises:
        ConfigError: a stage's settings are wrong, or stages need each other in a circle.
    """
    planner = _Planner(study, out)
    for seed in study.seeds:
        for arm in study.arms:
            for stage in study.measure:
                planner.add_all(arm, seed, stage)
        for place in _compared(study, seed):
            planner.add_all(place.arm, seed, place.stage)
    plan = Plan(name, study, planner.runs, planner.places)
    for finding in study.findings:
        sides = [plan.run(s.arm, study.seeds[0], s.stage) for s in (finding.this, finding.than)]
        asked = {tuple(getattr(run.config, "data", ())) for run in sides}
        if sides[0].verb == "eval" and len(asked) > 1:
            raise ConfigError(f"{finding.claim!r} compares answers to different questions")
    return plan


def _compared(study: Study, seed: int) -> Iterator[Place]:
    """Places of findings and figures whose stages may not be measured for every arm."""
    for finding in study.findings:
        yield from (Place(s.arm, seed, s.stage) for s in (finding.this, finding.than))
    for one in study.correlations:
        yield from (Place(one.arm, seed, stage) for stage in (one.select, one.scores))
    for figure in study.figures:
        yield from (Place(arm, seed, figure.stage) for arm in figure.arms or study.arms)


class _Planner:
    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self.runs: dict[str, Run] = {}
        self.places: dict[Place, str] = {}
        self._open: list[Place] = []

    def add_all(self, arm: str, seed: int, stage: str) -> None:
        """Add the runs of a stage: one, or one for each of its steps."""
        name, at, _ = stage.partition("@")
        steps = self.study.stages[name].steps
        for one in [stage] if at or not steps else [f"{name}@{step}" for step in steps]:
            self.add(Place(arm, seed, one))

    def add(self, place: Place) -> Run:
        """Add a run and all that it needs; return it."""
        if place in self.places:
            return self.runs[self.places[place]]
        if place in self._open:
            circle = " -> ".join(each.stage for each in [*self._open, place])
            raise ConfigError(f"stages need each other in a circle: {circle}")
        self._open.append(place)
        run = self._resolved(place)
        self._open.pop()
        same = self.runs.setdefault(run.key, run)
        if same.config != run.config:
            raise ConfigError(f"two settings of {place.stage} would write into {run.folder}")
        self.places[place] = run.key
        return same

    def _resolved(self, place: Place) -> Run:
        name, _, step = place.stage.partition("@")
        stage = self.study.stages[name]
        if bool(step) != bool(stage.steps) or (step and int(step) not in stage.steps):
            raise ConfigError(f"{place.stage} must name one of the steps {list(stage.steps)}")
        settings = stage.settings | self.study.arms[place.arm].get(name, {})
        texts = {key: json.dumps(value) for key, value in settings.items()}
        if step:
            texts = {k: v.replace("{step}", f"step-{int(step):06d}") for k, v in texts.items()}
        needed: dict[str, Run] = {}
        for other in self.study.stages:
            if other != name and any(f"{{{other}}}" in text for text in texts.values()):
                needed[other] = self.add(Place(place.arm, place.seed, other))
        for other, run in needed.items():
            texts = {k: v.replace(f"{{{other}}}", str(run.folder)) for k, v in texts.items()}
        kind = STAGES[stage.verb]
        first = [f"run={_OWN}"]
        if "seed" in kind.model_fields:
            first.append(f"seed={place.seed}")
        overrides = [*first, *(f"{key}={text}" for key, text in texts.items())]
        config = load(kind, stage.config, overrides)
        _check_inputs(place, config)
        key = f"{stage.verb}-{self._hash(config)}"
        folder = self.out / "runs" / key
        if stage.verb == "select":
            folder = Path(getattr(config, "run", _OWN))
            if str(folder) == _OWN:
                raise ConfigError(f"stage {name}: `run` must be the folder of a grpo stage")
            # One selection of a run; another rule would overwrite it.
            key = f"select-{folder.name}"
        else:
            config = load(kind, stage.config, [f"run={folder}", *overrides[1:]])
        file = self.out / "configs" / f"{key}.yaml"
        needs = tuple(run.key for run in needed.values())
        return Run(key, stage.verb, config, folder, file, needs)

    def _hash(self, config: Any) -> str:
        """A hash of the settings, in which the folders of earlier runs stand by their names."""
        tree = config.model_dump(mode="json")
        model = getattr(config, "model", None)
        if model is not None and self.out not in model.parents and model.is_dir():
            tree["model"] = folder_digest(model)
        text = json_text(tree).replace(f"{self.out}/", "")
        return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


def _check_inputs(place: Place, config: Any) -> None:
    """Refuse inputs in the run's own folder, where only the stages of one folder find them."""
    if not isinstance(config, Stage):
        return
    for key in ("model", "train_data", "validation_data", "data"):
        value = getattr(config, key, None)
        if _OWN in str(value):
            shown = str(value).replace(_OWN, "{run}")
            raise ConfigError(
                f"stage {place.stage}: {key} is {shown}, but every run of a study has its own "
                f"folder; set it, such as {key}: '{{grpo}}/models/grpo' for that of stage grpo"
            )
