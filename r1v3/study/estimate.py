"""When a study will end: from what its runs have to do, corrected by those that have ended."""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from r1v3.config import GRPO, Evaluate, Supervised, modes_of
from r1v3.study.finished import wanted_data
from r1v3.study.plan import Run

# Seconds of one core of a two-core AMD EPYC (AVX2) with the demo's model: what a run costs before
# its work, a sample composed, a pair learned from, a response sampled and learned from, an answer.
_START, _SAMPLE, _PAIR, _RESPONSE, _ANSWER = 8.0, 0.004, 0.034, 0.02, 0.0113


class Clock:
    """An estimate of the end.

    Args:
        runs: all runs of the studies.
        jobs: so many run at a time.
    """

    def __init__(self, runs: Mapping[str, Run], jobs: int) -> None:
        self.jobs = jobs
        self.expected = {key: _expected(run, runs) for key, run in runs.items()}
        self.verbs = {key: run.verb for key, run in runs.items()}
        self.spent: dict[str, float] = {}

    def ended(self, key: str, seconds: float) -> None:
        """Learn from a run that took so long, from its beginning, at a time."""
        self.spent[key] = seconds

    def left(self, keys: Collection[str]) -> float:
        """Return the seconds that the runs `keys` still take together, others waiting or not."""
        total = sum(self.expected[key] * self._factor(self.verbs[key]) for key in keys)
        longest = max((self.expected[k] * self._factor(self.verbs[k]) for k in keys), default=0.0)
        return max(total / self.jobs, longest)

    def _factor(self, verb: str) -> float:
        """The time of a verb over the expected one; of all verbs before one of it has ended."""
        for keys in ([k for k in self.spent if self.verbs[k] == verb], list(self.spent)):
            if planned := sum(self.expected[key] for key in keys):
                return sum(self.spent[key] for key in keys) / planned
        return 1.0


def cores_of(run: Run) -> int:
    """Return how many cores a run keeps busy."""
    return int(getattr(run.config, "processes", 1) * (getattr(run.config, "threads", None) or 1))


def _expected(run: Run, runs: Mapping[str, Run]) -> float:
    return _START + _work(run, run.config, runs) / cores_of(run)


def _work(run: Run, config: Any, runs: Mapping[str, Run]) -> float:
    if run.verb == "data":
        return _SAMPLE * sum(getattr(config, name) for name in wanted_data(config))
    if isinstance(config, Supervised):
        return _PAIR * config.epochs * _rows(config.train_data, run, runs)
    if isinstance(config, GRPO):
        sampled = config.steps * config.prompts_per_step * config.group_size
        asked = _rows(config.validation_data, run, runs) * config.validation_samples
        return _RESPONSE * sampled + _ANSWER * asked * (config.steps // config.validate_every)
    if isinstance(config, Evaluate):
        answers = [config.samples if m == "slow" else config.mode_samples for m in modes_of(config)]
        return _ANSWER * sum(answers) * sum(_rows(file, run, runs) for file in config.data)
    return 0.0


def _rows(file: Path, run: Run, runs: Mapping[str, Run]) -> int:
    """Rows of a file, which a run of the study may still have to write; 1000 where unknown."""
    for key in run.needs:
        needed = runs[key]
        if needed.verb == "data" and needed.folder in file.parents:
            return int(getattr(needed.config, file.stem, 1000))
    return _rows_of(file)


@functools.cache
def _rows_of(file: Path) -> int:
    if file.suffix != ".parquet" or not file.is_file():
        return 1000
    from pyarrow import parquet

    return int(parquet.read_metadata(file).num_rows)
