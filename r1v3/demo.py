"""The whole recipe in one run folder: data, SFT, GRPO, connector, selection, evaluation, report."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from r1v3.config import STAGES, Evaluate, Select, load
from r1v3.data import recipe
from r1v3.data.schema import load_samples
from r1v3.demo_time import expected_seconds, measure
from r1v3.engine.build import connect
from r1v3.evaluation.evaluate import evaluate
from r1v3.evaluation.summary import EVALUATED, summarize
from r1v3.files import write_json, write_text
from r1v3.local_job import local_job
from r1v3.ranks import Ranks
from r1v3.report.page import write_report
from r1v3.report.tables import summary_table
from r1v3.suite.benchmarks.digits import FILE, rows_of, write_table
from r1v3.trainer import connector, grpo, sft
from r1v3.trainer.critical_tokens import ENTROPY_BIN_EDGES
from r1v3.trainer.selection import select_from_run
from r1v3.trainer.stage import begin


def choose_run(parent: Path, resuming: bool) -> Path:
    """The newest `demo-N` folder when resuming, else the next free one."""
    numbers = [
        int(found.group(1))
        for path in parent.glob("demo-*")
        if (found := re.fullmatch(r"demo-(\d+)", path.name))
    ]
    if resuming:
        if not numbers:
            raise ValueError(f"there is no {parent}/demo-N to resume; start without --resume")
        return parent / f"demo-{max(numbers)}"
    return parent / f"demo-{max(numbers, default=0) + 1}"


class Clock:
    """Seconds spent in each stage, kept across resumed runs; of several ranks one writes them."""

    def __init__(self, run: Path, ranks: Ranks) -> None:
        self.path, self.ranks = run / "seconds.json", ranks
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            self.seconds = json.loads(self.path.read_text(encoding="utf-8"))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside, also when it is interrupted."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 1)
            if self.ranks.is_main:
                write_json(self.path, self.seconds)


@dataclass(frozen=True)
class Demo:
    """A demo in its run folder, with the loaded configuration of every stage.

    Attributes:
        configs: the folder of the stages' files.
        stages: data, sft, grpo, connector and select.
    """

    run: Path
    seed: int
    configs: Path
    stages: dict[str, Any]
    resuming: bool

    @property
    def base(self) -> Path:
        """The model that post-training starts from."""
        return Path(self.stages["sft"].model)

    def scoring(self, *overrides: str) -> Evaluate:
        """The configuration of an evaluation."""
        common = [f"run={self.run}", f"seed={self.seed}"]
        return load(Evaluate, self.configs / "eval.yaml", [*common, *overrides])


def load_demo(run: Path, seed: int, configs: Path, *, resuming: bool) -> Demo:
    """Load the configuration of every stage.

    Raises:
        ValueError: a file is missing or wrong, or the stages do not share their processes.
    """
    common = [f"run={run}", f"seed={seed}"]
    stages: dict[str, Any] = {
        name: load(STAGES[name], configs / f"{name}.yaml", common)
        for name in ("data", "sft", "grpo", "connector")
    }
    stages["select"] = load(Select, configs / "select.yaml", [f"run={run}"])
    demo = Demo(run, seed, configs, stages, resuming)
    processes = {name: stages[name].processes for name in ("sft", "grpo", "connector")}
    processes["eval"] = demo.scoring().processes
    if len(set(processes.values())) > 1:
        told = ", ".join(f"{name} {number}" for name, number in processes.items())
        raise ValueError(f"the stages of a demo share their processes; {configs} asks for {told}")
    return demo


def run_demo(run: Path | None, seed: int, configs: Path, *, resuming: bool) -> dict[str, Any]:
    """Run every stage, skipping what a resumed run has finished, and print the summary."""
    if "WORLD_SIZE" in os.environ:
        raise ValueError("the demo starts its processes itself: run it without torchrun")
    console = Console()
    folder = run or choose_run(Path("runs"), resuming)
    if not configs.is_dir():
        raise ValueError(f"no folder {configs}: run from the repository, or give --configs")
    seed = _remember_seed(folder, seed, resuming)
    console.rule(f"r1v3 demo, seed {seed}, in {folder}")
    demo = load_demo(folder, seed, configs, resuming=resuming)
    resolved = {
        name: config.model_dump(mode="json")
        for name, config in demo.stages.items()
        if name != "select"
    }
    write_text(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))

    def foretell() -> None:
        if not resuming:
            speed = measure(demo.base, demo.stages["data"])
            minutes = expected_seconds(speed, demo.stages, demo.scoring()) / 60
            console.print(f"about {minutes:.0f} minutes, longer beside other programs")

    begin("data", demo.stages["data"], folder)
    write_json(folder / "metrics" / "entropy_histogram_edges.json", list(ENTROPY_BIN_EDGES))
    with local_job(demo.stages["sft"], run_stages, demo, meanwhile=foretell):
        seconds = run_stages(demo, console)
    started = time.perf_counter()
    summary = summarize(folder, seed, demo.base, seconds)
    page = write_report(folder)
    console.print(summary_table(summary))
    total = sum(seconds.values()) + time.perf_counter() - started
    console.print(f"{total:.0f} seconds in all; read {page}")
    return summary


def run_stages(demo: Demo, console: Console | None = None) -> dict[str, float]:
    """Run every stage up to the evaluation, as one rank of the job.

    Args:
        console: what the first rank prints on.

    Returns:
        Seconds spent in each stage.
    """
    stages = demo.stages
    ranks = connect(stages["sft"])
    clock = Clock(demo.run, ranks)
    if console is None:
        console = Console(quiet=True)
    with clock.stage("data"):
        recipe.build(
            stages["data"],
            lambda line: console.print(line, highlight=False, soft_wrap=True),
            ranks,
        )
        ranks.on_main(partial(_write_questions, demo))
    with clock.stage("sft"):
        sft.train(stages["sft"], resuming=demo.resuming)
    with clock.stage("grpo"):
        grpo.train(stages["grpo"], resuming=demo.resuming)
    with clock.stage("connector"):
        connector.train(stages["connector"], resuming=demo.resuming)
    with clock.stage("select"):
        chosen = ranks.on_main(lambda: select_from_run(stages["select"]))
        console.print(f"selected by critical-token entropy: {chosen}")
    with clock.stage("evaluation"):
        _evaluate_all(demo, ranks, console)
    return clock.seconds


def _write_questions(demo: Demo) -> None:
    """Write the test questions as a file of VLMEvalKit, for it and for `r1v3 suite`."""
    path = demo.run / "LMUData" / FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = [sample for file in demo.scoring().data for sample in load_samples(file)]
        write_table(path, rows_of(asked))


def _evaluate_all(demo: Demo, ranks: Ranks, console: Console) -> None:
    """Score every stage; a checkpoint that is another stage's is not scored twice."""
    for name in EVALUATED:
        model = demo.base if name == "base" else demo.run / "models" / name
        overrides = [f"name={name}", f"model={model}"]
        if name == "base":
            # Before post-training the model knows no thinking template; it answers directly.
            overrides += ["modes=[nothink]", "budgets=[]"]
        elif name != "grpo":
            overrides += ["budgets=[]"]
        config = demo.scoring(*overrides)
        ranks.on_main(partial(begin, f"eval-{name}", config, demo.run))
        if name == "selected" and _same_weights(model, demo.run / "models" / "grpo"):
            ranks.on_main(partial(_copy_scores, demo.run, model))
            continue
        evaluate(config, partial(_show, console, name))


def _copy_scores(run: Path, model: Path) -> None:
    record = json.loads((run / "evaluation/grpo.json").read_text(encoding="utf-8"))
    record["checkpoint"] = str(model)
    write_json(run / "evaluation/selected.json", record, indent=None)


def _show(console: Console, name: str, mode: str, result: dict[str, Any]) -> None:
    parts = [
        f"{label} {score['accuracy']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
        for label, score in (
            ("in-domain", result["in_domain"]),
            ("out-of-domain", result["out_of_domain"]),
        )
        if score
    ]
    console.print(f"eval {name:<10} {mode:<10} {'  '.join(parts)}", highlight=False, soft_wrap=True)


def _same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def _remember_seed(folder: Path, seed: int, resuming: bool) -> int:
    """A resumed run keeps the seed it was started with."""
    path = folder / "seed.json"
    if resuming:
        if not path.exists():
            raise ValueError(f"{folder} holds no demo to resume; start without --resume")
        return int(json.loads(path.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise ValueError(f"{folder} already holds a run; pass --resume, or another --run")
    write_json(path, seed)
    return seed
