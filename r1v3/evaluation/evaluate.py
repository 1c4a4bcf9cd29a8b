"""Scores of a checkpoint in every decoding mode, on questions that it was not trained on."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1v3.config import Evaluate, modes_of
from r1v3.data.encoding import Example, encode_all, model_image_shape
from r1v3.data.lengths import PositionLimit
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.data.tiles import TileCache
from r1v3.data.tokenizer import load_tokenizer
from r1v3.data.words import expand_words
from r1v3.engine.build import connect, resolve_max_tiles
from r1v3.evaluation.measures import answer_measures, question_facts
from r1v3.evaluation.policy import Answers, Policy, build_policy, mode_sampling, question_seed
from r1v3.evaluation.statistics import score
from r1v3.files import digest_of, read_json_object, write_bytes, write_json
from r1v3.model.conversion import load_config
from r1v3.progress import progress_bar
from r1v3.ranks import Ranks


def domain_scores(
    samples: Sequence[Sample], answers: Answers, out_of_domain: Sequence[str]
) -> dict[str, Any]:
    """Return the scores in domain, out of domain and per domain, as JSON."""
    domains = np.array([str(sample.domain) for sample in samples])
    outside = np.isin(domains, list(out_of_domain))

    def of(rows: np.ndarray) -> dict[str, Any] | None:
        return asdict(score(answers.correct[rows], answers.tokens[rows])) if rows.any() else None

    return {
        "in_domain": of(~outside),
        "out_of_domain": of(outside),
        "domains": {name: of(domains == name) for name in sorted(set(domains))},
    }


def _repeats(config: Evaluate, mode: str) -> int:
    """Completions of each question in a mode."""
    return config.samples if mode == "slow" else config.mode_samples


def question_seeds(seed: int, samples: Sequence[Sample]) -> list[int]:
    """The seeds of the questions' random numbers, which depend on what they ask and show."""
    return [
        question_seed(seed, one.data_source, str(one.index), one.question, *one.images)
        for one in samples
    ]


def run_mode(
    config: Evaluate,
    policy: Policy,
    samples: Sequence[Sample],
    mode: str,
    notify: Callable[[int], None] = lambda completions: None,
) -> tuple[dict[str, Any], Answers]:
    """Score one mode; a question's random numbers depend on it and the seed alone.

    A batch holds as many completions in every mode: where a question is answered once, more
    questions share the cost of a decoding step. `notify`: see `Policy.answer`.
    """
    sampling, thinking = mode_sampling(
        config.decoding, config.monitor.words, policy.tokenizer, mode
    )
    repeats = _repeats(config, mode)
    answers = policy.answer(
        samples,
        sampling,
        generator=torch.Generator(),
        seeds=question_seeds(config.seed, samples),
        repeats=repeats,
        thinking=thinking,
        batch_prompts=config.batch_prompts * max(1, config.samples // repeats),
        notify=notify,
    )
    return domain_scores(samples, answers, config.out_of_domain), answers


def evaluate(config: Evaluate, notify: Any = None) -> dict[str, Any]:
    """Score a checkpoint in all configured modes; return what it writes.

    `<run>/evaluation/<name>.json` is written after every mode, so that an interrupted evaluation
    goes on with the next one. It also holds what was measured of every answer in every mode
    (`answers`, see `answer_measures`) with domain and difficulty of the questions, for paired
    comparisons, and the correctness of slow thinking once more as `correct`. Sample transcripts
    with their images go to `<run>/transcripts`.

    Args:
        notify: called with the name and the scores of each mode.

    Raises:
        ValueError: the configuration names no model.
    """
    if config.model is None:
        raise ValueError("`model` must name the folder of the checkpoint to score")
    ranks = connect(config)
    run = Path(config.run)
    path = run / "evaluation" / f"{config.name}.json"
    config = resolve_max_tiles(config)
    policy, samples, dropped = _policy(config, ranks)
    record = ranks.on_main(lambda: _read(path, config))
    record |= {"dropped": dropped, "questions": question_facts(samples)}
    critical = expand_words(policy.tokenizer, config.monitor.words)
    missing = [mode for mode in modes_of(config) if mode not in record["modes"]]
    total = sum(len(samples) * _repeats(config, mode) for mode in missing)
    with progress_bar(f"eval {config.name}", total, shown=ranks.is_main) as bar:
        for mode in missing:
            result, answers = run_mode(config, policy, samples, mode, bar.advance)
            record["modes"][mode] = result
            record["answers"][mode] = answer_measures(
                answers, critical, config.monitor.high_entropy_nats
            )
            if mode == "slow":
                record["correct"] = answers.correct.astype(int).tolist()
            if not ranks.is_main:
                continue
            if mode == "slow":
                _write_transcripts(run, config, policy, samples, answers)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record, indent=None)
            if notify is not None:
                notify(mode, result)
    return record


def _policy(config: Evaluate, ranks: Ranks) -> tuple[Policy, list[Sample], int]:
    """The checkpoint, sampled as the configuration says (vLLM loads it elsewhere), its questions,
    and how many were dropped: too long, or with a truncated picture."""
    assert config.model is not None
    tokenizer, model = load_tokenizer(config.model), load_config(config.model)
    shape = model_image_shape(model, config.max_tiles, config.pictures)
    limit = PositionLimit.of(model, config.too_long, config.decoding.max_tokens)
    samples: list[Sample] = []
    cache = TileCache()
    encoded: list[Example] = []
    total = 0
    for file in config.data:
        asked = load_samples(file)
        examples = encode_all(file, asked, tokenizer, shape, ranks=ranks, cache=cache)
        kept = limit.rows(file, examples, shown=ranks.is_main)
        samples += [asked[i] for i in kept]
        encoded += [examples[i] for i in kept]
        total += len(asked)

    longest = max((len(example.prompt_ids) for example in encoded), default=0)
    most = longest + config.decoding.max_tokens
    policy = build_policy(config, tokenizer, shape, ranks, max_length=most, cache=cache)
    policy.remember(samples, encoded)
    return policy, samples, total - len(samples)


def _read(path: Path, config: Evaluate) -> dict[str, Any]:
    """The record to go on with: the one in the file if it is of the same scoring, or a new one."""
    fresh = {"checkpoint": str(config.model), "scoring": _scoring(config), "modes": {}}
    fresh["answers"] = {}
    try:
        record = read_json_object(path)
    except (OSError, ValueError):
        return fresh
    if all(record.get(k) == fresh[k] for k in ("checkpoint", "scoring")):
        # Records of an earlier version have no answers.
        return {"answers": {}, **record}
    return fresh


def _scoring(config: Evaluate) -> dict[str, Any]:
    """Everything a score depends on: digests of weights and questions, and the settings."""
    assert config.model is not None

    def digest(path: Path) -> str:
        return digest_of(path)[1]

    fields = {
        "seed",
        "max_tiles",
        "pictures",
        "too_long",
        "out_of_domain",
        "samples",
        "mode_samples",
        "decoding",
        "monitor",
    }
    return {
        "weights": [digest(file) for file in sorted(config.model.glob("*.safetensors"))],
        "data": [digest(Path(file)) for file in config.data],
        "random_numbers": "of each question",  # earlier versions drew them batch by batch
        **config.model_dump(mode="json", include=fields),
    }


def _write_transcripts(
    run: Path, config: Evaluate, policy: Policy, samples: Sequence[Sample], answers: Answers
) -> None:
    """Write the first answer to evenly spaced questions, token by token with entropies."""
    critical = set(expand_words(policy.tokenizer, config.monitor.words))
    count = min(config.transcripts, len(samples))
    folder = run / "transcripts"
    folder.mkdir(parents=True, exist_ok=True)
    repeats = answers.correct.shape[1]
    transcripts = []
    for i in np.linspace(0, len(samples) - 1, count).astype(int) if count else []:
        sample, rollout = samples[i], answers.rollouts[i]
        images = []
        for data in sample.images:
            # Named by content: fields of a data file do not name files, and stages share pictures.
            name = f"images/{hashlib.sha256(data).hexdigest()[:20]}.png"
            (folder / "images").mkdir(exist_ok=True)
            write_bytes(folder / name, data)
            images.append(f"transcripts/{name}")
        tokens = [
            {
                "text": policy.tokenizer.decode([token]),
                "entropy": None if math.isnan(entropy) else round(entropy, 4),
                "critical": token in critical,
            }
            for token, entropy, kept in zip(
                rollout.response_ids[0].tolist(),
                rollout.entropy[0].tolist(),
                rollout.mask[0].tolist(),
                strict=True,
            )
            if kept and token != policy.stop_id
        ]
        transcripts.append(
            {
                "question": sample.question,
                "options": sample.options,
                "image": images[0] if images else None,
                "ground_truth": sample.ground_truth,
                "mode": "slow",
                "response": answers.texts[i * repeats],
                "correct": bool(answers.correct[i, 0]),
                "tokens": tokens,
            }
        )
    write_json(folder / f"{config.name}.json", transcripts)
