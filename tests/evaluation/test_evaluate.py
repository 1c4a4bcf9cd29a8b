"""Scoring a checkpoint: modes, resumption, records and transcripts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1v3.config import Decoding, Evaluate, Monitor
from r1v3.data.sample import make_sample
from r1v3.data.schema import write_samples
from r1v3.data.words import expand_words
from r1v3.evaluation import evaluate as benchmark
from r1v3.evaluation.evaluate import evaluate, question_seeds, run_mode
from r1v3.evaluation.policy import Policy, load_policy, mode_sampling
from tests import tiny

WORDS = Monitor().words
QUESTIONS = tiny.some_questions(6)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and a data file that no test changes."""
    root = tmp_path_factory.mktemp("benchmark")
    tiny.save(root / "model")
    write_samples(root / "questions.parquet", QUESTIONS)
    return root


@pytest.fixture(scope="module")
def policy(home: Path) -> Policy:
    return load_policy(home / "model")


def config(home: Path, run: Path, **changes: Any) -> Evaluate:
    fields: dict[str, Any] = {
        "run": run,
        "model": home / "model",
        "data": (home / "questions.parquet",),
        "out_of_domain": ("counting",),
        "modes": ("slow", "nothink"),
        "samples": 2,
        "decoding": Decoding(max_tokens=8),
        "transcripts": 3,
    }
    return Evaluate(**{**fields, **changes})


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that were really scored."""
    seen: list[str] = []
    real = benchmark.run_mode

    def watch(config: Evaluate, policy: Policy, samples: Any, mode: str, *further: Any) -> Any:
        seen.append(mode)
        return real(config, policy, samples, mode, *further)

    monkeypatch.setattr(benchmark, "run_mode", watch)
    return seen


def test_modes_decode_as_the_report_says(policy: Policy) -> None:
    decoding = Decoding(temperature=0.7, max_tokens=8)
    words = tuple(expand_words(policy.tokenizer, WORDS))
    wanted = {
        "slow": ((), None, True),
        "nothink": ((), None, False),
        "nowait": (words, None, True),
        "budget-16": ((), 16, True),
    }
    for mode, (banned, budget, thinking) in wanted.items():
        sampling, opens = mode_sampling(decoding, WORDS, policy.tokenizer, mode)
        assert (sampling.banned, sampling.budget, opens) == (banned, budget, thinking)
        assert (sampling.temperature, sampling.max_tokens) == (0.7, 8)


def test_nowait_bans_every_form_of_every_word(policy: Policy) -> None:
    sampling, _ = mode_sampling(Decoding(), WORDS, policy.tokenizer, "nowait")
    texts = [policy.tokenizer.decode([i]).strip(" .,").lower() for i in sampling.banned]
    assert set(texts) == {"wait", "hmm", "alternatively"}
    for text in (" Wait", " Hmm", " Alternatively"):
        (token,) = policy.tokenizer.encode(text, add_special_tokens=False)
        assert token in sampling.banned


@pytest.mark.parametrize("mode", ["fast", "", "budget", "budget-x", "budget--3"])
def test_an_unknown_mode_is_refused(policy: Policy, mode: str) -> None:
    with pytest.raises(ValueError, match="is not slow, nothink, nowait or budget-N"):
        mode_sampling(Decoding(), WORDS, policy.tokenizer, mode)


def test_a_mode_gives_the_same_score_again(home: Path, policy: Policy, tmp_path: Path) -> None:
    settings = config(home, tmp_path)
    first, again = (run_mode(settings, policy, QUESTIONS, "slow") for _ in range(2))
    assert first[0] == again[0] and first[1].texts == again[1].texts
    other = config(home, tmp_path, seed=1)
    assert run_mode(other, policy, QUESTIONS, "slow")[1].texts != first[1].texts
    small = config(home, tmp_path, batch_prompts=2)
    assert run_mode(small, policy, QUESTIONS, "slow")[1].texts == first[1].texts


def test_an_answer_does_not_depend_on_what_else_is_asked(
    home: Path, policy: Policy, tmp_path: Path
) -> None:
    """Fails if other questions, their order or the number of samples change an answer; or if two
    questions that differ in their picture alone have the same random numbers."""
    settings = config(home, tmp_path)
    whole = run_mode(settings, policy, QUESTIONS, "slow")[1].texts
    part = run_mode(settings, policy, [QUESTIONS[4], QUESTIONS[1]], "slow")[1].texts
    assert part == whole[8:10] + whole[2:4]
    more = run_mode(config(home, tmp_path, samples=3), policy, QUESTIONS[:1], "slow")[1].texts
    assert more[:2] == whole[:2]
    other = QUESTIONS[0].model_copy(update={"images": QUESTIONS[3].images})
    assert question_seeds(0, [QUESTIONS[0]]) != question_seeds(0, [other])


def test_domains_are_scored_apart_and_the_held_out_one_by_itself(
    home: Path, policy: Policy, tmp_path: Path
) -> None:
    result, answers = run_mode(config(home, tmp_path), policy, QUESTIONS, "slow")
    assert set(result["domains"]) == {"arithmetic", "comparison", "counting"}
    outside = np.array([s.domain == "counting" for s in QUESTIONS])
    for part, rows in (("out_of_domain", outside), ("in_domain", ~outside)):
        assert result[part]["accuracy"] == pytest.approx(answers.correct[rows].mean())
        assert result[part]["tokens"] == pytest.approx(answers.tokens[rows].mean())
        assert (result[part]["questions"], result[part]["samples"]) == (rows.sum(), 2)
    assert result["domains"]["counting"] == result["out_of_domain"]


def test_no_question_out_of_domain_is_no_score_and_not_zero(
    home: Path, policy: Policy, tmp_path: Path
) -> None:
    settings = config(home, tmp_path, out_of_domain=())
    assert run_mode(settings, policy, QUESTIONS, "nothink")[0]["out_of_domain"] is None


def test_a_record_has_every_mode_and_the_correctness_of_every_slow_answer(
    home: Path, tmp_path: Path, scored: list[str]
) -> None:
    told: list[str] = []
    settings = config(home, tmp_path, budgets=(3,), name="mine")
    record = evaluate(settings, lambda mode, result: told.append(mode))
    assert scored == told == list(record["modes"]) == ["slow", "nothink", "budget-3"]
    assert record == json.loads((tmp_path / "evaluation" / "mine.json").read_text())
    assert np.array(record["correct"]).shape == (6, 2)
    assert record["checkpoint"] == str(home / "model")
    assert list(record["answers"]) == list(record["modes"])
    for mode, measures in record["answers"].items():
        assert {key: np.array(values).shape for key, values in measures.items()} == dict.fromkeys(
            ("correct", "tokens", "entropy", "high_entropy_share", "critical_tokens", "repetition"),
            (6, 2 if mode == "slow" else 1),
        )
        inside = np.array(record["questions"]["domain"]) != "counting"
        score = record["modes"][mode]["in_domain"]
        assert score["accuracy"] == pytest.approx(np.array(measures["correct"])[inside].mean())
        assert score["tokens"] == pytest.approx(np.array(measures["tokens"])[inside].mean())
    assert record["answers"]["slow"]["correct"] == record["correct"]


def test_an_interrupted_evaluation_goes_on_where_it_was(
    home: Path, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(config(home, tmp_path / "whole"))
    scored.clear()

    def stop(mode: str, result: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config(home, tmp_path / "cut"), stop)
    assert scored == ["slow"]
    assert evaluate(config(home, tmp_path / "cut")) == whole
    assert scored == ["slow", "nothink"]
    evaluate(config(home, tmp_path / "cut"))
    assert scored == ["slow", "nothink"]  # nothing left to do


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"samples": 3},
        {"decoding": Decoding(max_tokens=9)},
        {"decoding": Decoding(temperature=0.5, max_tokens=8)},
        {"out_of_domain": ("comparison",)},
    ],
    ids=str,
)
def test_scores_of_other_settings_are_not_reused(
    home: Path, tmp_path: Path, scored: list[str], change: dict[str, Any]
) -> None:
    evaluate(config(home, tmp_path))
    record = evaluate(config(home, tmp_path, **change))
    assert scored == ["slow", "nothink"] * 2
    assert len(record["correct"][0]) == change.get("samples", 2)


def test_scores_of_another_checkpoint_are_not_reused(
    home: Path, tmp_path: Path, scored: list[str]
) -> None:
    """Neither of another folder, nor of other weights in the same folder."""
    evaluate(config(home, tmp_path))
    evaluate(config(home, tmp_path, model=tiny.save(tmp_path / "other", seed=1)))
    assert scored == ["slow", "nothink"] * 2
    tiny.save(tmp_path / "other", seed=2)
    evaluate(config(home, tmp_path, model=tmp_path / "other"))
    assert scored == ["slow", "nothink"] * 3


def test_scores_of_other_questions_in_the_same_file_are_not_reused(
    home: Path, tmp_path: Path, scored: list[str]
) -> None:
    data = tmp_path / "q.parquet"
    for count in (6, 4):
        write_samples(data, QUESTIONS[:count])
        record = evaluate(config(home, tmp_path, data=(data,), modes=("slow",)))
        assert len(record["correct"]) == count
    assert scored == ["slow"] * 2


def test_a_damaged_record_is_scored_anew(home: Path, tmp_path: Path, scored: list[str]) -> None:
    (tmp_path / "evaluation").mkdir()
    for text in ("{", "[]", '{"checkpoint": 3}', ""):
        (tmp_path / "evaluation" / "checkpoint.json").write_text(text)
        evaluate(config(home, tmp_path, modes=("nothink",)))
    assert scored == ["nothink"] * 4


def test_transcripts_show_pictures_tokens_and_entropies(
    home: Path, policy: Policy, tmp_path: Path
) -> None:
    settings = config(home, tmp_path, name="mine")
    evaluate(settings)
    _, answers = run_mode(settings, policy, QUESTIONS, "slow")
    shown = json.loads((tmp_path / "transcripts" / "mine.json").read_text())
    critical = set(expand_words(policy.tokenizer, settings.monitor.words))
    assert len(shown) == 3
    for entry, i in zip(shown, (0, 2, 5), strict=True):
        sample, rollout = QUESTIONS[i], answers.rollouts[i]
        assert (tmp_path / entry["image"]).read_bytes() == sample.images[0]
        assert entry["question"] == sample.question and entry["options"] == sample.options
        assert entry["response"] == answers.texts[2 * i] and entry["mode"] == "slow"
        assert entry["ground_truth"] == sample.ground_truth
        assert entry["correct"] == bool(answers.correct[i, 0])
        kept = rollout.mask[0] & (rollout.response_ids[0] != policy.stop_id)
        ids = rollout.response_ids[0][kept].tolist()
        assert [t["text"] for t in entry["tokens"]] == [policy.tokenizer.decode([n]) for n in ids]
        assert [t["critical"] for t in entry["tokens"]] == [n in critical for n in ids]
        entropies = [t["entropy"] for t in entry["tokens"]]
        assert entropies == pytest.approx(rollout.entropy[0][kept].tolist(), abs=1e-4)


def test_fields_of_a_data_file_name_no_files(home: Path, tmp_path: Path) -> None:
    """A split of `../../x` would write outside the run folder."""
    hostile = make_sample(
        question="How many?",
        ground_truth="1",
        data_source="t",
        index=0,
        split="../../../out",
        domain="/tmp/x\x00",
        images=[QUESTIONS[0].images[0]],
    )
    data = tmp_path / "q.jsonl"
    write_samples(data, [hostile])
    evaluate(config(home, tmp_path / "a" / "run", data=(data,), modes=("slow",)))
    inside = {p for p in tmp_path.rglob("*") if p.is_file()} - {data}
    assert all((tmp_path / "a" / "run") in p.parents for p in inside)
    (entry,) = json.loads((tmp_path / "a/run/transcripts/checkpoint.json").read_text())
    assert (tmp_path / "a/run" / entry["image"]).is_file()


def test_no_transcripts_are_written_where_none_are_wanted(home: Path, tmp_path: Path) -> None:
    evaluate(config(home, tmp_path, transcripts=0, modes=("slow",)))
    assert json.loads((tmp_path / "transcripts" / "checkpoint.json").read_text()) == []


def test_a_checkpoint_must_be_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`model` must name the folder"):
        evaluate(config(home, tmp_path, model=None))
