"""Writes the datasets of the handwriting recipe into a run folder."""

import fcntl
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from r1v3.config import Data
from r1v3.data.builders import (
    EXPLAINED_KINDS,
    SKILL_KINDS,
    ColdStart,
    base_corpus,
    cold_start,
    connector_mix,
    questions,
)
from r1v3.data.chains import TeacherConfig
from r1v3.data.sample import Sample
from r1v3.data.schema import write_samples
from r1v3.data.search_chains import Searcher
from r1v3.data.search_rows import (
    IN_DOMAIN_KINDS,
    OUT_OF_DOMAIN_KINDS,
    Mix,
    search_cold_start,
    search_connector_mix,
    search_questions,
)
from r1v3.data.search_tasks import Range
from r1v3.data.tasks import IN_DOMAIN, OUT_OF_DOMAIN
from r1v3.files import read_json_object, write_json
from r1v3.progress import progress_bar
from r1v3.ranks import ALONE, Ranks


def build(
    config: Data, notify: Callable[[str], None] = lambda line: None, ranks: Ranks = ALONE
) -> dict[str, Path]:
    """Build every dataset with a count above zero; files that are already there are kept.

    Args:
        notify: called on the first rank with a line for every file that was built.
        ranks: processes that share the files among them.

    Returns:
        name -> `<run>/data/<name>.parquet`; `<run>/data/statistics.json` says what is in them and
        how the rejection sampling of cold-start chains went.
    """
    folder = Path(config.run) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    account = folder / "statistics.json"
    makers = _makers(config)
    counts = {name: getattr(config, name) for name in makers if getattr(config, name)}
    paths = {name: folder / f"{name}.parquet" for name in counts}

    def missing() -> list[str]:
        # A file without its statistics is what a build leaves that was stopped in between.
        known = _read(account)
        return [name for name in counts if not (paths[name].exists() and name in known)]

    shares = share_out({name: counts[name] for name in ranks.on_main(missing)}, ranks.size)
    mine = shares[ranks.rank]
    with progress_bar("data", sum(counts[name] for name in mine), shown=ranks.is_main) as bar:
        for name in mine:
            samples, found = makers[name](counts[name])
            write_samples(paths[name], samples)
            domains = Counter(str(sample.domain) for sample in samples)
            found[name] = {"samples": len(samples), "domains": dict(sorted(domains.items()))}
            _add(account, found)
            bar.advance(counts[name])
            if ranks.is_main:
                notify(f"{name}: {counts[name]} samples")
    ranks.barrier()
    for name in (name for share in shares[1:] for name in share):
        if ranks.is_main:
            notify(f"{name}: {counts[name]} samples")
    return paths


def cold_start_rows(config: Data, count: int) -> list[Sample]:
    """Make so many rows of the cold start, as `build` would, and write nothing."""
    return _makers(config)["sft"](count)[0]


def share_out(counts: Mapping[str, int], parts: int) -> list[list[str]]:
    """Share named work among `parts`, the largest first, each to the part that has least."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(counts, key=lambda name: -counts[name]):
        min(shares, key=lambda share: sum(counts[other] for other in share)).append(name)
    return [[name for name in counts if name in share] for share in shares]


Maker = Callable[[int], tuple[list[Sample], dict[str, object]]]


def _plain(make: Callable[[int], list[Sample]]) -> Maker:
    return lambda count: (make(count), {})


def _makers(config: Data) -> dict[str, Maker]:
    """Functions that make so many samples of each dataset, and say what is to be told of them."""
    return _handwriting_makers(config) | (
        _search_makers(config) if config.tasks == "search" else {}
    )


def _search_makers(config: Data) -> dict[str, Maker]:
    seed, tries, teacher = config.seed, config.tries, config.search
    searcher = Searcher(
        Range(teacher.signs, teacher.largest),
        **teacher.model_dump(
            include={"order", "noise", "plain", "sharpness", "check", "most_trials"}
        ),
    )
    mix = Mix(teacher.bare, teacher.drill)

    def chains(split: str, count: int) -> tuple[list[Sample], dict[str, object]]:
        result = search_cold_start(split, count, seed, searcher, mix, tries=tries)
        return result.samples, {f"chains_{split}": _rejection(result)}

    def asked(split: str, kinds: tuple[tuple[str, str], ...], seed: int) -> Maker:
        return _plain(lambda n: search_questions(split, kinds, n, seed, searcher))

    def connector(split: str) -> Maker:
        return _plain(lambda n: search_connector_mix(split, n, seed, searcher, tries=tries))

    return {
        "sft": lambda n: chains("train", n),
        "sft_validation": lambda n: chains("validation", n),
        "grpo": asked("rl", IN_DOMAIN_KINDS, seed),
        "grpo_validation": asked("validation", IN_DOMAIN_KINDS, seed),
        "connector": connector("train"),
        "connector_validation": connector("validation"),
        "test_in_domain": asked("test", IN_DOMAIN_KINDS, seed),
        "test_out_of_domain": asked("test", OUT_OF_DOMAIN_KINDS, seed + 1),
    }


def _handwriting_makers(config: Data) -> dict[str, Maker]:
    teacher = TeacherConfig(**config.teacher.model_dump())
    seed = config.seed

    def chains(split: str, count: int) -> tuple[list[Sample], dict[str, object]]:
        result = cold_start(split, count, seed, teacher, tries=config.tries)
        return result.samples, {f"chains_{split}": _rejection(result)}

    others: dict[str, Callable[[int], list[Sample]]] = {
        "base": lambda n: base_corpus("train", n, seed),
        "base_validation": lambda n: base_corpus("validation", n, seed),
        "skills": lambda n: base_corpus("train", n, seed + 5, SKILL_KINDS),
        "explained": lambda n: base_corpus("train", n, seed + 6, EXPLAINED_KINDS),
        "explained_validation": lambda n: base_corpus("validation", n, seed + 6, EXPLAINED_KINDS),
        "skills_validation": lambda n: base_corpus("validation", n, seed + 5, SKILL_KINDS),
        "grpo": lambda n: questions("rl", IN_DOMAIN, n, seed),
        "grpo_validation": lambda n: questions("validation", IN_DOMAIN, n, seed),
        "connector": lambda n: connector_mix("train", n, seed, teacher),
        "connector_validation": lambda n: connector_mix("validation", n, seed, teacher),
        "test_in_domain": lambda n: questions("test", IN_DOMAIN, n, seed),
        "test_out_of_domain": lambda n: questions("test", OUT_OF_DOMAIN, n, seed + 1),
    }
    return {
        "sft": lambda n: chains("train", n),
        "sft_validation": lambda n: chains("validation", n),
        **{name: _plain(make) for name, make in others.items()},
    }


def _read(account: Path) -> dict[str, object]:
    return read_json_object(account) if account.is_file() else {}


def _add(account: Path, found: dict[str, object]) -> None:
    """Add to the statistics, to which other ranks add as well."""
    folder = os.open(account.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_json(account, _read(account) | found)
    finally:
        os.close(folder)


def _rejection(result: ColdStart) -> dict[str, float]:
    return {
        "questions_kept": len(result.samples),
        "questions_abandoned": result.abandoned,
        "chains_written": result.written,
        "chains_rejected": result.written - len(result.samples),
        "share_with_rechecks": result.rechecks / max(1, len(result.samples)),
    }
