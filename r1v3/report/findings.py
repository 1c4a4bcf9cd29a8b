"""Sentences about a run, chosen by its numbers: what was measured, never what was hoped for.

"First" and "last" of a curve are the means of its first and last fifth of steps. Two of them count
as different when they differ by more than two standard errors of the step-to-step scatter; two
scores do when a paired gain's interval excludes zero or, unpaired, when their intervals are apart.
"""

import math
from dataclasses import dataclass

import numpy as np

from r1v3.evaluation.statistics import Gain, Score
from r1v3.report.run_folder import (
    STAGE_NAMES,
    Record,
    RunFolder,
    checkpoints,
    entropy_correlation,
    number,
    read_gain,
    series,
    stage_modes,
)
from r1v3.report.tables import main_stage, mode_budget, mode_rows, percent, summary_rows

SAME, OPPOSITE = "same direction", "opposite direction"
UNCLEAR, IMPOSSIBLE, UNMEASURED = "not separated", "cannot occur here", "not measured"


@dataclass(frozen=True)
class Finding:
    """One statement of the report beside what this run measured."""

    claim: str
    paper: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class Trend:
    """Means of the first and last fifth of a curve; sign is 0 when they are not separated."""

    first: float
    last: float
    sign: int


def trend(values: list[float]) -> Trend | None:
    """First and last fifth of `values`; None below 10 values."""
    if len(values) < 10:
        return None
    fifth = len(values) // 5
    head, tail = np.array(values[:fifth]), np.array(values[-fifth:])
    difference = float(tail.mean() - head.mean())
    error = math.sqrt((head.var(ddof=1) + tail.var(ddof=1)) / fifth)
    sign = 0 if abs(difference) <= 2 * error else int(math.copysign(1, difference))
    return Trend(float(head.mean()), float(tail.mean()), sign)


def _verdict(sign: int, expected: int) -> str:
    return UNCLEAR if sign == 0 else SAME if sign == expected else OPPOSITE


def _sign(earlier: Score, later: Score) -> int:
    if later.low > earlier.high:
        return 1
    return -1 if later.high < earlier.low else 0


def _gain(summary: Record, key: str) -> Gain | None:
    gains = summary.get("gain")
    return read_gain(gains.get(key)) if isinstance(gains, dict) else None


def _gain_sign(gain: Gain) -> int:
    return 0 if gain.low <= 0 <= gain.high else int(math.copysign(1, gain.mean))


def headline(run: RunFolder) -> str:
    """The result of the run in one sentence."""
    gain = _gain(run.summary, "grpo_minus_sft")
    if gain is None:
        return "This run did not get as far as measuring what GRPO gained."
    size = f"{abs(100 * gain.mean):.1f} points"
    interval = f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
    count = f"{gain.questions} questions with {gain.samples} samples each, paired by question"
    sign = _gain_sign(gain)
    if sign == 0:
        return (
            f"GRPO changed accuracy by {100 * gain.mean:+.1f} points, which cannot be told from no"
            f" change ({interval}; {count})."
        )
    return f"GRPO {'raised' if sign > 0 else 'lowered'} accuracy by {size} ({interval}; {count})."


def stage_sentences(run: RunFolder) -> list[tuple[str, str]]:
    """(name of the stage, what happened in it) for each stage that left something behind."""
    parts = [
        (
            "sft",
            "Teaches the format and a first way of reasoning from worked examples.",
            _supervised(run.sft),
        ),
        (
            "grpo",
            "Samples several answers per question, rewards the right ones and moves toward them.",
            _reinforced(run),
        ),
        (
            "selected",
            "Chooses among the saved checkpoints by the entropy at critical tokens.",
            _selected(run),
        ),
        (
            "connector",
            "Trains the connector alone, vision encoder and language model frozen.",
            _supervised(run.connector),
        ),
    ]
    seconds = run.summary.get("seconds")
    found = []
    for stage, purpose, facts in parts:
        if not facts:
            continue
        spent = number(seconds.get(stage)) if isinstance(seconds, dict) else None
        if spent is not None:
            facts.append(f"{spent:.0f} s")
        found.append((STAGE_NAMES[stage], f"{purpose} Here: {'; '.join(facts)}."))
    return found


def _supervised(records: list[Record]) -> list[str]:
    steps, losses = series(records, "loss")
    if not steps:
        return []
    facts = [
        f"{len(steps)} logged steps",
        f"loss {losses[0]:.3g} at the first, {losses[-1]:.3g} at the last",
    ]
    _, held_out = series(records, "validation_loss")
    if len(held_out) > 1:
        facts.append(f"validation loss {held_out[0]:.3g} to {held_out[-1]:.3g}")
    return facts


def _reinforced(run: RunFolder) -> list[str]:
    steps, _ = series(run.grpo, "reward")
    if not steps:
        return []
    facts = [f"{len(steps)} steps"]
    for key, name in (("reward", "reward"), ("accuracy", "accuracy of the samples")):
        change = trend(series(run.grpo, key)[1])
        if change is not None:
            scatter = " (within the scatter of single steps)" if change.sign == 0 else ""
            facts.append(f"{name} {change.first:.3f} to {change.last:.3f}{scatter}")
    return facts


def _selected(run: RunFolder) -> list[str]:
    found = checkpoints(run.selection)
    chosen = [c for c in found if c.selected]
    if not chosen:
        return []
    best = max(found, key=lambda c: c.accuracy)
    facts = [f"step {chosen[0].step:g} of {len(found)} checkpoints"]
    facts.append(f"validation accuracy {percent(chosen[0].accuracy)} %")
    if best.accuracy > chosen[0].accuracy:
        facts.append(f"the best was step {best.step:g} with {percent(best.accuracy)} %")
    else:
        facts.append("no checkpoint had a higher one")
    return facts


def findings(run: RunFolder) -> list[Finding]:
    """Statements of the Skywork-R1V3 report, each beside what this run shows."""
    return [
        _post_training(run),
        _correlation(run),
        _connector(run),
        _mode(
            run,
            "nothink",
            "NoThink answers with fewer tokens and less accurately",
            "68.9 % against 76.0 %, 263 against 1272 tokens",
        ),
        _mode(
            run,
            "nowait",
            "NoWait saves tokens for a little accuracy",
            "74.1 % against 76.0 %, 1040 against 1272 tokens",
        ),
        _budget(run),
        _mean_entropy(run),
        _high_entropy(run),
        _length(run),
    ]


def _post_training(run: RunFolder) -> Finding:
    claim, paper = (
        "RL after the cold start raises accuracy (section 6.1)",
        "MMMU 74.5 %, SFT 65.4 %",
    )
    gain = _gain(run.summary, "grpo_minus_sft")
    if gain is None:
        return Finding(claim, paper, "", UNMEASURED)
    return Finding(claim, paper, _gain_text(gain), _verdict(_gain_sign(gain), 1))


def _gain_text(gain: Gain) -> str:
    ends = f"{100 * gain.low:+.1f}, {100 * gain.high:+.1f}"
    return f"{100 * gain.mean:+.1f} points [{ends}], paired"


def _correlation(run: RunFolder) -> Finding:
    claim = "Checkpoints with higher critical-token entropy are more accurate (figure 5)"
    found = checkpoints(run.selection)
    measured = entropy_correlation(found)
    if measured.spearman is None or measured.spearman_p is None:
        few = f"n = {measured.n} checkpoints" if found else ""
        return Finding(claim, "rise together", few, UNMEASURED)
    text = (
        f"Spearman's ρ = {measured.spearman:+.2f}, n = {measured.n} checkpoints,"
        f" p = {measured.spearman_p:.2f}"
    )
    sign = 0 if measured.spearman_p > 0.05 else int(np.sign(measured.spearman))
    return Finding(claim, "rise together", text, _verdict(sign, 1))


def _connector(run: RunFolder) -> Finding:
    claim, paper = "Tuning only the connector after RL helps (table 2)", "74.5 to 76.0 %"
    for key in ("connector_minus_selected", "connector_minus_grpo"):
        gain = _gain(run.summary, key)
        if gain is not None:
            return Finding(claim, paper, _gain_text(gain), _verdict(_gain_sign(gain), 1))
    scores = {row.key: row.in_domain for row in summary_rows(run.summary)}
    before, after = scores.get("grpo"), scores.get("connector")
    if before is None or after is None:
        return Finding(claim, paper, "", UNMEASURED)
    text = f"in-domain {percent(before.accuracy)} to {percent(after.accuracy)} %, unpaired"
    return Finding(claim, paper, text, _verdict(_sign(before, after), 1))


def _mode(run: RunFolder, mode: str, claim: str, paper: str) -> Finding:
    claim = f"{claim} (table 4)"
    scores = {row.key: row.in_domain for row in mode_rows(run.summary)}
    slow, other = scores.get("slow"), scores.get(mode)
    if slow is None or other is None:
        return Finding(claim, paper, "", UNMEASURED)
    text = (
        f"in-domain {percent(other.accuracy)} % against {percent(slow.accuracy)} %,"
        f" {other.tokens:.1f} against {slow.tokens:.1f} tokens"
    )
    sign, saved = _sign(slow, other), other.tokens < slow.tokens
    if sign == 0:
        return Finding(
            claim, paper, text, f"{'fewer' if saved else 'not fewer'} tokens, accuracy {UNCLEAR}"
        )
    if saved == (sign < 0):
        return Finding(claim, paper, text, SAME if saved else OPPOSITE)
    half = "fewer tokens, but more accurate" if saved else "less accurate, but not fewer tokens"
    return Finding(claim, paper, text, half)


def _budget(run: RunFolder) -> Finding:
    claim, paper = (
        "Accuracy grows with the thinking budget (figure 9)",
        "1k tokens 61.6 % to 16k 76.0 %",
    )
    points = [(mode_budget(r.key), r.in_domain) for r in mode_rows(run.summary)]
    known = [(b, s) for b, s in points if b is not None and s is not None]
    if len(known) < 2:
        return Finding(claim, paper, "", UNMEASURED)
    (small, first), (large, last) = known[0], known[-1]
    rises = sum(b.accuracy > a.accuracy for (_, a), (_, b) in zip(known, known[1:], strict=False))
    text = (
        f"{small} tokens {percent(first.accuracy)} % to {large} tokens {percent(last.accuracy)} %;"
        f" {rises} of {len(known) - 1} steps up the budget rise"
    )
    return Finding(claim, paper, text, _verdict(_sign(first, last), 1))


def _mean_entropy(run: RunFolder) -> Finding:
    claim, paper = "Mean token entropy falls during RL (figure 10)", "falls, steps 140 to 220"
    change = trend(series(run.grpo, "entropy")[1])
    if change is None:
        return Finding(claim, paper, "", UNMEASURED)
    text = f"{change.first:.3f} to {change.last:.3f} nats"
    return Finding(claim, paper, text, _verdict(change.sign, -1))


def _high_entropy(run: RunFolder) -> Finding:
    claim = "Tokens above 6.8 nats become more frequent (figure 10)"
    threshold = run.high_entropy_nats
    vocabulary = number(run.summary.get("vocabulary"))
    if vocabulary is not None and 1 < vocabulary <= math.exp(threshold):
        text = (
            f"ln({vocabulary:.0f}) = {math.log(vocabulary):.2f} nats is the most a token can have"
        )
        return Finding(claim, "rises", text, IMPOSSIBLE)
    change = trend(series(run.grpo, "high_entropy_share")[1])
    if change is None:
        return Finding(claim, "rises", "", UNMEASURED)
    text = f"{100 * change.first:.3g} to {100 * change.last:.3g} % of tokens"
    if threshold != 6.8:
        text += f" above {threshold:g} nats"
    return Finding(claim, "rises", text, _verdict(change.sign, 1))


def _length(run: RunFolder) -> Finding:
    claim = "Responses grow longer during RL after a cold start (figure 11)"
    change = trend(series(run.grpo, "response_length")[1])
    if change is None:
        return Finding(claim, "grow", "", UNMEASURED)
    text = f"{change.first:.1f} to {change.last:.1f} tokens"
    return Finding(claim, "grow", text, _verdict(change.sign, 1))


def summing_up(found: list[Finding]) -> str:
    """The number of statements with each verdict, in a sentence."""
    counts = {v: sum(f.verdict == v for f in found) for v in (SAME, OPPOSITE, UNCLEAR)}
    other = len(found) - sum(counts.values())
    return (
        f"Statements of the report: {len(found)}. In this run, {counts[SAME]} went in the same"
        f" direction and {counts[OPPOSITE]} in the opposite one; {counts[UNCLEAR]} could not be"
        f" separated from no effect, and {other} were mixed or not comparable."
    )


def parameters_text(summary: Record) -> str:
    """Size of the model and its parts, empty when not recorded."""
    parameters = summary.get("parameters")
    if not isinstance(parameters, dict):
        return ""
    known = {str(k): v for k, v in ((k, number(v)) for k, v in parameters.items()) if v is not None}
    parts = ", ".join(f"{name} {value:,.0f}" for name, value in known.items())
    return f"{sum(known.values()):,.0f} parameters ({parts})" if known else ""


def model_scale(summary: Record) -> str:
    """The size of this run's model beside that of the report, in a sentence."""
    parameters = summary.get("parameters")
    sizes = map(number, parameters.values()) if isinstance(parameters, dict) else ()
    total = sum(size for size in sizes if size is not None)
    if total <= 0:
        return "The numbers on this page are those of this run and not the report's."
    return (
        f"Here the model has {total:,.0f} parameters, the report's has 38 billion: the numbers on"
        " this page are those of this run and not the report's."
    )


def evaluation_size(summary: Record) -> str:
    """Questions and samples behind the table, empty when not recorded."""
    stage = main_stage(summary)
    rows = [r for r in mode_rows(summary, stage) if r.key == "slow"] if stage else []
    if not rows or not stage_modes(summary, stage or ""):
        return ""
    sets = (("in-domain", rows[0].in_domain), ("out-of-domain", rows[0].out_of_domain))
    return ", ".join(f"{s.questions} {n} questions x {s.samples} samples" for n, s in sets if s)
