"""The whole recipe in one run folder: data, SFT, GRPO, connector, selection, evaluation, report."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from r1v3.config import GRPO, SFT, Connector, Data, Evaluate, Section, Select, load
from r1v3.data import recipe
from r1v3.data.tokenizer import load_tokenizer
from r1v3.evaluation.benchmark import evaluate
from r1v3.evaluation.report import write_report
from r1v3.evaluation.statistics import paired_gain
from r1v3.evaluation.tables import summary_table
from r1v3.files import replace_directory, temporary_sibling, write_json, write_text
from r1v3.model.internvl import count_parameters, load_model
from r1v3.trainer import connector, grpo, sft
from r1v3.trainer.checkpoint import MANIFEST, STATE, TENSORS
from r1v3.trainer.critical_tokens import ENTROPY_BIN_EDGES
from r1v3.trainer.metrics import read_metrics
from r1v3.trainer.selection import CheckpointRecord, select_checkpoint, write_selection
from r1v3.trainer.stage import begin

EVALUATED = ("base", "sft", "grpo", "connector", "selected")
_ENTROPY_WINDOW = 5


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


def select_from_run(config: Select) -> str:
    """Choose among the GRPO checkpoints of a run; writes selection.json and `models/selected`.

    The critical-token entropy of a checkpoint is the mean over the last training steps before it,
    weighted by how many critical tokens each saw; it was measured while training. Where no
    checkpoint ever emitted one, validation accuracy decides, and selection.json says so.
    """
    run = Path(config.run)
    lines = {line["step"]: line for line in read_metrics(run / "metrics" / "grpo.jsonl")}
    records = []
    for path in sorted((run / "checkpoints" / "grpo").glob("step-*")):
        step = int(path.name.removeprefix("step-"))
        line = lines.get(step, {})
        window = [lines[s] for s in range(step - _ENTROPY_WINDOW + 1, step + 1) if s in lines]
        records.append(
            CheckpointRecord(
                name=path.name,
                step=step,
                critical_entropy=_weighted(window, "critical_entropy"),
                critical_entropy_after=_weighted(window, "critical_entropy_after"),
                critical_tokens=sum(int(w.get("critical_tokens") or 0) for w in window),
                validation_accuracy=line.get("validation_accuracy"),
                validation_low=line.get("validation_low"),
                validation_high=line.get("validation_high"),
            )
        )
    rule = config.rule
    if rule == "critical_entropy" and all(r.critical_entropy is None for r in records):
        # A policy that never says "Wait" has no critical tokens to be chosen by.
        rule = "validation_accuracy"
    selection = select_checkpoint(records, rule=rule)
    write_selection(run, selection)
    _publish_copy(run / "checkpoints" / "grpo" / selection.selected.name, run / "models/selected")
    return selection.selected.name


def _weighted(lines: list[dict[str, Any]], key: str) -> float | None:
    pairs = [
        (line[key], line["critical_tokens"])
        for line in lines
        if line.get(key) is not None and line.get("critical_tokens")
    ]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _publish_copy(source: Path, target: Path) -> None:
    """Copy the model of a checkpoint, without the trainer's files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = temporary_sibling(target)
    temporary.mkdir()
    for file in source.iterdir():
        if file.name not in (MANIFEST, STATE, TENSORS):
            shutil.copyfile(file, temporary / file.name)
    replace_directory(temporary, target)


def summarise(run: Path, seed: int, base: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Collect the evaluation records of a run into summary.json."""
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
    """Which questions of the evaluation are in domain: they come first, in file order."""
    counts = json.loads((run / "data" / "statistics.json").read_text(encoding="utf-8"))
    inside = counts["test_in_domain"]["samples"]
    outside = counts.get("test_out_of_domain", {}).get("samples", 0)
    return np.arange(inside + outside) < inside


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
        summary = summarise(folder, seed, base, clock.seconds)
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
