"""The whole recipe in one run folder: data, SFT, GRPO, connector, selection, evaluation, report."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from r1v3.config import GRPO, SFT, Connector, Data, Evaluate, Section, Select, load
from r1v3.data import recipe
from r1v3.demo_time import expected_seconds, measure
from r1v3.evaluation.evaluate import evaluate
from r1v3.evaluation.summary import EVALUATED, summarize
from r1v3.files import write_json, write_text
from r1v3.report.page import write_report
from r1v3.report.tables import summary_table
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
    """Seconds spent in each stage, kept across resumed runs."""

    def __init__(self, run: Path) -> None:
        self.path = run / "seconds.json"
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
            write_json(self.path, self.seconds)


def _evaluate_all(run: Path, configs: Path, base: Path, common: list[str], show: Any) -> None:
    """Score every stage; a checkpoint that is another stage's is not scored twice."""
    for name in EVALUATED:
        model = base if name == "base" else run / "models" / name
        overrides = [*common, f"name={name}", f"model={model}"]
        if name == "base":
            # Before post-training the model knows no thinking template; it answers directly.
            overrides += ["modes=[nothink]", "budgets=[]"]
        elif name != "grpo":
            overrides += ["budgets=[]"]
        config = load(Evaluate, configs / "eval.yaml", overrides)
        begin(f"eval-{name}", config, run)
        if name == "selected" and _same_weights(model, run / "models" / "grpo"):
            record = json.loads((run / "evaluation/grpo.json").read_text(encoding="utf-8"))
            write_json(
                run / "evaluation/selected.json", {**record, "checkpoint": str(model)}, indent=None
            )
            continue
        evaluate(config, lambda mode, result, name=name: show(name, mode, result))


def _same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def run_demo(run: Path | None, seed: int, configs: Path, *, resuming: bool) -> dict[str, Any]:
    """Run every stage, skipping what a resumed run has finished, and print the summary."""
    console = Console()
    folder = run or choose_run(Path("runs"), resuming)
    if not configs.is_dir():
        raise ValueError(f"no folder {configs}: run from the repository, or give --configs")
    seed = _remember_seed(folder, seed, resuming)
    common = [f"run={folder}", f"seed={seed}"]
    clock = Clock(folder)
    console.rule(f"r1v3 demo, seed {seed}, in {folder}")
    kinds: dict[str, type[Section]] = {"data": Data, "sft": SFT, "grpo": GRPO}
    kinds |= {"connector": Connector}
    loaded: dict[str, Any] = {
        name: load(kind, configs / f"{name}.yaml", common) for name, kind in kinds.items()
    }
    selecting = load(Select, configs / "select.yaml", [f"run={folder}"])
    resolved = {name: config.model_dump(mode="json") for name, config in loaded.items()}
    write_text(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    base = Path(loaded["sft"].model)
    scoring = load(Evaluate, configs / "eval.yaml", common)
    if not resuming:
        minutes = expected_seconds(measure(base), **loaded, scoring=scoring) / 60
        console.print(f"about {minutes:.0f} minutes, longer beside other programs")
    begin("data", loaded["data"], folder)
    with clock.stage("data"):
        recipe.build(
            loaded["data"], lambda line: console.print(line, highlight=False, soft_wrap=True)
        )
    write_json(folder / "metrics" / "entropy_histogram_edges.json", list(ENTROPY_BIN_EDGES))
    with clock.stage("sft"):
        sft.train(loaded["sft"], resuming=resuming)
    with clock.stage("grpo"):
        grpo.train(loaded["grpo"], resuming=resuming)
    with clock.stage("connector"):
        connector.train(loaded["connector"], resuming=resuming)
    with clock.stage("select"):
        console.print(f"selected by critical-token entropy: {select_from_run(selecting)}")

    def show(name: str, mode: str, result: dict[str, Any]) -> None:
        parts = [
            f"{label} {score['accuracy']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
            for label, score in (
                ("in-domain", result["in_domain"]),
                ("out-of-domain", result["out_of_domain"]),
            )
            if score
        ]
        console.print(
            f"eval {name:<10} {mode:<10} {'  '.join(parts)}", highlight=False, soft_wrap=True
        )

    with clock.stage("evaluation"):
        _evaluate_all(folder, configs, base, common, show)
    with clock.stage("report"):
        summary = summarize(folder, seed, base, clock.seconds)
        page = write_report(folder)
    console.print(summary_table(summary))
    console.print(f"{sum(clock.seconds.values()):.0f} seconds in all; read {page}")
    return summary


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
