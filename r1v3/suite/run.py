"""`r1v3 suite`: asks what has no answer yet, scores all answers, writes and prints the tables."""

import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from r1v3.config import Suite, modes_of
from r1v3.data.encoding import model_image_shape
from r1v3.data.lengths import PositionLimit
from r1v3.data.tokenizer import load_tokenizer
from r1v3.engine.build import connect, resolve_max_tiles
from r1v3.evaluation.policy import build_policy
from r1v3.files import digest_of, read_json_object, write_json, write_text
from r1v3.model.conversion import load_config
from r1v3.progress import progress_bar, say
from r1v3.ranks import Ranks
from r1v3.suite.answers import AnswerFile
from r1v3.suite.ask import Asked, Asker
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks import BENCHMARKS
from r1v3.suite.cuts import cut
from r1v3.suite.export import write_predictions
from r1v3.suite.judge import Judge
from r1v3.suite.metrics import gain
from r1v3.suite.score import Incomplete, Outcomes, scored, verdicts
from r1v3.suite.table import Table, read_table
from r1v3.suite.tables import Record, sheets

REPORT_TEMPERATURE, REPORT_TOKENS, REPORT_SAMPLES = 1.0, 16384, 5
_WIDTH = 140  # of tables that go to a file
REPORT_JUDGE = "gpt-4o-2024-05-13"


@dataclass(frozen=True)
class Loaded:
    """A benchmark with its files and the questions that they ask."""

    benchmark: Benchmark
    tables: tuple[Table, ...]
    asked: tuple[Asked, ...]


def run_suite(config: Suite) -> Record | None:
    """Ask what is missing in all modes, score all answers; return what is written.

    On other processes than the first one of a job it returns None.

    Raises:
        ValueError: a benchmark, a file or a row cannot be used; the message names it.
    """
    ranks = connect(config)
    config = resolve_max_tiles(config)
    chosen = _load_all(config, shown=ranks.is_main)
    missing = ranks.on_main(
        lambda: sum(_missing(config, one, mode) for one in chosen for mode in modes_of(config))
    )
    if missing:
        _ask(config, chosen, ranks)
    return _score(config, chosen) if ranks.is_main else None


def score_suite(config: Suite) -> Record:
    """Score the answers that are there; see `run_suite`."""
    config = resolve_max_tiles(config)
    return _score(config, _load_all(config))


def _load_all(config: Suite, *, shown: bool = True) -> list[Loaded]:
    folder = data_folder(config)
    return [
        load_benchmark(one, folder, config, shown=shown)
        for one in chosen_benchmarks(config, folder)
    ]


def data_folder(config: Suite) -> Path:
    """The folder of the benchmarks' files: the configured one, $LMUData or ~/LMUData."""
    if config.data is not None:
        return config.data
    return Path(os.environ.get("LMUData", str(Path.home() / "LMUData")))


def chosen_benchmarks(config: Suite, folder: Path) -> list[Benchmark]:
    """The benchmarks that the configuration names, or all whose files are there.

    Raises:
        ValueError: there is no such benchmark, or no file at all.
    """
    for key in config.benchmarks:
        if key not in BENCHMARKS:
            near = difflib.get_close_matches(key, BENCHMARKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(BENCHMARKS)}"
            raise ValueError(f"there is no benchmark {key!r}; {hint}")
    if config.benchmarks:
        return [BENCHMARKS[key] for key in config.benchmarks]
    found = [
        one
        for one in BENCHMARKS.values()
        if all((folder / file.name).is_file() for file in one.files)
    ]
    if not found:
        names = ", ".join(file.name for one in BENCHMARKS.values() for file in one.files)
        raise ValueError(f"{folder} holds none of the benchmarks' files: {names}")
    return found


def load_benchmark(
    benchmark: Benchmark, folder: Path, config: Suite, *, shown: bool = True
) -> Loaded:
    """Read the files of a benchmark and make its questions.

    Args:
        shown: print the hashes of the files.

    Raises:
        ValueError: a file is refused, lacks a column or holds a partial set; or an id comes twice.
    """
    tables, asked, seen = [], [], set()
    for number, file in enumerate(benchmark.files):
        table = read_table(folder, file, allow_other=config.allow_other_files)
        state = {True: "published file", False: "NOT the published file", None: "no known hash"}
        hashes = f"sha256 {table.sha256}, md5 {table.md5} ({state[table.official]})"
        say(f"{table.path}: {hashes}", shown=shown)
        there = {name for row in table.rows for name in row.cells}
        if lacking := [column for column in benchmark.columns if column not in there]:
            raise ValueError(f"{table.path} has no column {', '.join(lacking)}")
        for i, row in enumerate(table.rows):
            try:
                question = benchmark.question(row, i)
            except ValueError as error:
                raise ValueError(f"{table.path} row {i}: {error}") from error
            if question is None:
                continue
            if question.id in seen or not question.id:
                raise ValueError(f"{table.path} row {i}: index {question.id!r} comes twice or not")
            seen.add(question.id)
            asked.append(Asked(question, number, i))
        tables.append(table)
    if not asked:
        raise ValueError(f"{tables[0].path} holds no question of {benchmark.title}")
    if not all(table.official for table in tables):
        benchmark.check([one.question for one in asked])
    return Loaded(benchmark, tuple(tables), tuple(asked))


def answer_file(config: Suite, loaded: Loaded, mode: str) -> AnswerFile:
    """The file of the answers that these settings lead to."""
    prompts = hashlib.sha256()
    for one in loaded.asked:
        prompts.update(f"{one.question.id}\0{one.question.prompt}\0".encode("utf-8", "replace"))
    settings: dict[str, Any] = {
        "weights": _weights(config),
        "files": [table.sha256 for table in loaded.tables],
        "prompts": prompts.hexdigest(),
        "mode": mode,
        **config.model_dump(
            mode="json",
            include={"seed", "decoding", "max_tiles", "row_tiles", "pictures", "too_long"},
        ),
    }
    if config.cuts:
        settings["ids"] = True
    if mode == "nowait":
        settings["words"] = list(config.monitor.words)
    folder = Path(config.run) / "suite" / config.name
    return AnswerFile(folder, loaded.benchmark.key, mode, settings)


def _weights(config: Suite) -> list[str]:
    """Digests of the weight files, kept by path, size and time: large ones take minutes."""
    assert config.model is not None
    kept_at = Path(config.run) / "suite" / "weights.json"
    try:
        kept = read_json_object(kept_at)
    except (OSError, ValueError):
        kept = {}
    found, changed = [], False
    for path in sorted(config.model.glob("*.safetensors")):
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if not isinstance(kept.get(key), str):
            _, kept[key] = digest_of(path)
            changed = True
        found.append(kept[key])
    if changed:
        write_json(kept_at, kept)
    return found


def _missing(config: Suite, loaded: Loaded, mode: str) -> int:
    """Samples that have to be asked."""
    have = answer_file(config, loaded, mode).samples()
    wanted = set(range(config.samples))
    return sum(len(wanted - have.get(one.question.id, set())) for one in loaded.asked)


def _ask(config: Suite, chosen: Sequence[Loaded], ranks: Ranks) -> None:
    assert config.model is not None
    tokenizer, model = load_tokenizer(config.model), load_config(config.model)
    limit = PositionLimit.of(model, config.too_long, config.decoding.max_tokens)

    shape = model_image_shape(model, config.max_tiles, config.pictures)
    policy = build_policy(config, tokenizer, shape, ranks, max_length=limit.positions)
    for loaded in chosen:
        for mode in modes_of(config):
            missing = ranks.on_main(partial(_missing, config, loaded, mode))
            if not missing:
                continue
            total = len(loaded.asked) * config.samples
            title = f"{loaded.benchmark.key} {mode}"
            asker = Asker(config, policy, limit, ranks, mode)
            with progress_bar(title, total, done=total - missing, shown=ranks.is_main) as bar:
                asker.ask(
                    loaded.benchmark.key,
                    loaded.asked,
                    loaded.tables,
                    answer_file(config, loaded, mode),
                    bar.advance,
                )
    policy.sampler.close()


def _score(config: Suite, chosen: Sequence[Loaded]) -> Record:
    """Score, write and print."""
    folder = Path(config.run) / "suite"
    judge = None
    if config.judge.url is not None:
        judge = Judge(config.judge, folder / "judge.jsonl")
    named = config.judge.model if judge is not None else None
    assert config.model is not None
    tokenizer = load_tokenizer(config.model)
    record = Record(config.name, config.protocol, named, config.compare)
    for loaded in chosen:
        key, unpaired = loaded.benchmark.key, list[str]()
        for mode in [*modes_of(config), *(f"cut-{n}" for n in config.cuts)]:
            answers = answer_file(config, loaded, "slow" if mode.startswith("cut-") else mode)
            kept = answers.read()
            if mode.startswith("cut-"):
                kept = cut(kept, int(mode.removeprefix("cut-")), tokenizer)
            try:
                outcomes = verdicts(
                    loaded.benchmark,
                    [one.question for one in loaded.asked],
                    kept,
                    samples=config.samples,
                    thinking=mode != "nothink",
                    protocol=config.protocol,
                    judge=judge,
                    phrases=loaded.benchmark.phrases and mode == "slow",
                )
            except Incomplete as error:
                record.incomplete[f"{key} {mode}"] = str(error)
                continue
            record.scores.setdefault(key, {})[mode] = scored(loaded.benchmark, mode, outcomes)
            if mode == "slow":
                slow = outcomes
            elif "slow" in record.scores[key]:
                record.mode_gains.setdefault(key, {})[mode] = gain(
                    *(loaded.benchmark.grouping(o.questions, o.right) for o in (slow, outcomes))
                )
            record.differences[key] = differences(config, loaded)
            at = folder / config.name / "outcomes" / f"{key}.{mode}.json"
            _write_outcomes(at, outcomes)
            if config.compare is not None:
                other = folder / config.compare
                if not _compare(record, other, loaded.benchmark, mode, outcomes):
                    unpaired.append(mode)
            exported = config.protocol == "kit" and not mode.startswith("cut-")
            if exported and loaded.benchmark.kit_name is not None:
                parts = (loaded.benchmark, loaded.tables, loaded.asked)
                write_predictions(folder / "kit", config, *parts, mode, answers)
        if unpaired:
            place = f"{key} {', '.join(unpaired)} against {config.compare}"
            record.incomplete[place] = "not scored there, or on other rows"
    _write(folder / config.name, record)
    if judge is not None and judge.rejected is not None:
        say(judge.rejected)
    return record


def _write(folder: Path, record: Record) -> None:
    made = sheets(record)
    write_json(folder / "scores.json", record.as_json())
    write_text(folder / "scores.md", "\n".join(sheet.markdown() for sheet in made))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for sheet in made:
        if sheet.printed:
            sheet.show(console)
    say(f"{folder / 'scores.md'} also has the categories of every benchmark")
    try:
        from r1v3.suite.figures import write_figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        say("figures need matplotlib: pip install 'r1v3[demo]'")
        return
    if drawn := write_figures(folder):
        say(f"{drawn[0].parent} has {', '.join(file.name for file in drawn)}")


def _write_outcomes(path: Path, outcomes: Outcomes) -> None:
    write_json(
        path,
        {
            "rows": [question.id for question in outcomes.questions],
            "right": outcomes.right.astype(int).tolist(),
            "no_verdict": outcomes.no_verdict.astype(int).tolist(),
        },
        indent=None,
    )


def _compare(
    record: Record, other: Path, benchmark: Benchmark, mode: str, outcomes: Outcomes
) -> bool:
    """Pair with the outcomes of another checkpoint; False where it has none on the same rows."""
    try:
        kept = read_json_object(other / "outcomes" / f"{benchmark.key}.{mode}.json")
    except OSError:
        return False
    if kept["rows"] != [question.id for question in outcomes.questions]:
        return False
    before = benchmark.grouping(outcomes.questions, np.array(kept["right"], dtype=bool))
    after = benchmark.grouping(outcomes.questions, outcomes.right)
    record.gains.setdefault(benchmark.key, {})[mode] = gain(before, after)
    return True


def differences(config: Suite, loaded: Loaded) -> list[str]:
    """Differences from the report's settings, as far as they are known."""
    if loaded.benchmark.report is None:
        return ["the report does not have it", *loaded.benchmark.differences]
    decoding, found = config.decoding, []
    if decoding.temperature != REPORT_TEMPERATURE:
        found.append(f"temperature {decoding.temperature:g}, report {REPORT_TEMPERATURE:g}")
    if decoding.max_tokens != REPORT_TOKENS:
        found.append(f"{decoding.max_tokens} tokens at most, report {REPORT_TOKENS}")
    if config.samples != REPORT_SAMPLES:
        found.append(f"{config.samples} samples, report {REPORT_SAMPLES}")
    if config.protocol == "kit":
        if loaded.benchmark.kit_rule is None:
            found.append("VLMEvalKit does not have it; rules of protocol report")
        else:
            found.append("VLMEvalKit's rules of November 2026")
    if config.judge.url is None:
        found.append(f"no judge, report {REPORT_JUDGE}")
    elif config.judge.model != REPORT_JUDGE:
        found.append(f"judge {config.judge.model}, report {REPORT_JUDGE}")
    if any(table.official is False for table in loaded.tables):
        found.append("not the published file")
    return [*found, *loaded.benchmark.differences]
