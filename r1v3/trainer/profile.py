"""Traces of chosen steps by torch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from r1v3.config import GRPO, Supervised
from r1v3.files import temporary_sibling, write_text
from r1v3.progress import say
from r1v3.ranks import Ranks

_TABLE_ROWS = 40
# Allocations and frees that a memory snapshot reaches back.
_MEMORY_EVENTS = 1_000_000


class StepProfiler:
    """Records the steps that `profile` of a configuration names.

    A recorded step writes to `folder`:

    - step-N.rank-R.json.gz, a trace for chrome://tracing or Perfetto;
    - step-N.rank-R.txt, the operators that took most of the step's own time;
    - on CUDA, step-N.rank-R.memory.pickle, allocations for PyTorch's memory viewer.
    """

    def __init__(self, config: GRPO | Supervised, folder: Path, ranks: Ranks) -> None:
        self.config, self.folder, self.rank = config.profile, folder, ranks.rank
        self.cuda = torch.device(config.device).type == "cuda"

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record what runs inside, if `number` (from 1) is one of the steps."""
        if number not in self.config.steps or self.rank not in self.config.ranks:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        try:
            with profile(activities=activities, acc_events=True) as recorded:
                yield
            self._write(recorded, self.folder / f"step-{number}.rank-{self.rank}")
        finally:
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile, path: Path) -> None:
        """Write the files of a step, whose names begin with `path`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        by_own_time = f"self_{'cuda' if self.cuda else 'cpu'}_time_total"
        table = recorded.key_averages().table(sort_by=by_own_time, row_limit=_TABLE_ROWS)
        write_text(path.with_name(f"{path.name}.txt"), table + "\n")
        trace = path.with_name(f"{path.name}.json.gz")
        # The profiler compresses what it exports to a name that ends in .gz.
        temporary = temporary_sibling(trace).with_suffix(".gz")
        try:
            recorded.export_chrome_trace(str(temporary))
            temporary.replace(trace)
            if self.cuda:
                temporary = temporary_sibling(path)
                torch.cuda.memory._dump_snapshot(str(temporary))
                temporary.replace(path.with_name(f"{path.name}.memory.pickle"))
        finally:
            temporary.unlink(missing_ok=True)
        say(f"profile of step {path.name.partition('.')[0].removeprefix('step-')}: {trace}")
