"""Writes the datasets of the handwriting recipe into a run folder."""

import json
from collections import Counter
from collections.abc import Callable
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
from r1v3.data.tasks import IN_DOMAIN, OUT_OF_DOMAIN
from r1v3.files import write_json
from r1v3.progress import progress_bar


def build(config: Data, notify: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """Build every dataset with a count above zero; files that are already there are kept.

    Returns:
        name -> `<run>/data/<name>.parquet`; `<run>/data/statistics.json` says what is in them and
        how the rejection sampling of cold-start chains went.
    """
    teacher = TeacherConfig(**config.teacher.model_dump())
    folder = Path(config.run) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    account = folder / "statistics.json"
    statistics: dict[str, object] = (
        json.loads(account.read_text(encoding="utf-8")) if account.is_file() else {}
    )

    def chains(split: str, count: int) -> list[Sample]:
        result = cold_start(split, count, config.seed, teacher, tries=config.tries)
        statistics[f"chains_{split}"] = _rejection(result)
        return result.samples

    seed = config.seed
    makers: dict[str, Callable[[int], list[Sample]]] = {
        "base": lambda n: base_corpus("train", n, seed),
        "base_validation": lambda n: base_corpus("validation", n, seed),
        "skills": lambda n: base_corpus("train", n, seed + 5, SKILL_KINDS),
        "explained": lambda n: base_corpus("train", n, seed + 6, EXPLAINED_KINDS),
        "explained_validation": lambda n: base_corpus("validation", n, seed + 6, EXPLAINED_KINDS),
        "skills_validation": lambda n: base_corpus("validation", n, seed + 5, SKILL_KINDS),
        "sft": lambda n: chains("train", n),
        "sft_validation": lambda n: chains("validation", n),
        "grpo": lambda n: questions("rl", IN_DOMAIN, n, seed),
        "grpo_validation": lambda n: questions("validation", IN_DOMAIN, n, seed),
        "connector": lambda n: connector_mix("train", n, seed, teacher),
        "connector_validation": lambda n: connector_mix("validation", n, seed, teacher),
        "test_in_domain": lambda n: questions("test", IN_DOMAIN, n, seed),
        "test_out_of_domain": lambda n: questions("test", OUT_OF_DOMAIN, n, seed + 1),
    }
    counts = {name: getattr(config, name) for name in makers if getattr(config, name)}
    paths = {name: folder / f"{name}.parquet" for name in counts}
    # A file without its statistics is what a build leaves that was stopped in between.
    missing = [name for name in counts if not (paths[name].exists() and name in statistics)]
    with progress_bar("data", sum(counts[name] for name in missing)) as bar:
        for name in missing:
            samples = makers[name](counts[name])
            write_samples(paths[name], samples)
            domains = Counter(str(sample.domain) for sample in samples)
            statistics[name] = {"samples": len(samples), "domains": dict(sorted(domains.items()))}
            write_json(account, statistics)
            bar.advance(counts[name])
            notify(f"{name}: {len(samples)} samples")
    return paths


def _rejection(result: ColdStart) -> dict[str, float]:
    return {
        "questions_kept": len(result.samples),
        "questions_abandoned": result.abandoned,
        "chains_written": result.written,
        "chains_rejected": result.written - len(result.samples),
        "share_with_rechecks": result.rechecks / max(1, len(result.samples)),
    }
