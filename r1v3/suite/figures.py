"""The report's figures 3, 5 and 9 from the scores of a suite, drawn like those of a run.

Scores are those of `scores.json`, as plain values: figures 3 and 5 show all checkpoints that were
scored by the same protocol in one run folder.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r1v3.evaluation.statistics import Score, correlation
from r1v3.files import read_json_object
from r1v3.report.figure_style import (
    ARM_COLORS,
    MODE_COLORS,
    UNBUDGETED,
    budget_curves,
    draw_png,
    interval_point,
    label_points,
)
from r1v3.report.figures import correlation_title
from r1v3.suite.benchmarks import BENCHMARKS

DOMAINS = "phyx"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and its scores, by benchmark, then by mode."""

    name: str
    scores: dict[str, dict[str, dict[str, Any]]]

    def slow(self, key: str) -> dict[str, Any] | None:
        """The scores of mode slow on a benchmark, if there are."""
        return self.scores.get(key, {}).get("slow")


def write_figures(folder: Path) -> list[Path]:
    """Draw what the scores in a checkpoint's folder allow as PNG below `figures`.

    Raises:
        OSError, ValueError: the folder has no scores.
    """
    own = read_json_object(folder / "scores.json")
    this = Checkpoint(folder.name, own["scores"])
    shown = list(_checkpoints(folder.parent, str(own["protocol"])))
    out = folder / "figures"
    drawn = [
        draw_png(shown, _draw_domains, out / "domains.png"),
        draw_png(shown, _draw_entropy, out / "entropy.png"),
    ]
    for key in this.scores:
        drawn.append(draw_png((this, key), _draw_budgets, out / f"budgets-{key}.png"))
    for stale in set(out.glob("*.png")) - set(drawn):
        stale.unlink()  # of scores that are no more
    return [file for file in drawn if file is not None]


def _checkpoints(folder: Path, protocol: str) -> Iterator[Checkpoint]:
    """The checkpoints of a run that were scored by a protocol, by name."""
    for path in sorted(folder.glob("*/scores.json")):
        try:
            record = read_json_object(path)
        except ValueError:
            continue
        if record.get("protocol") == protocol and isinstance(record.get("scores"), dict):
            yield Checkpoint(path.parent.name, record["scores"])


def _score(measured: dict[str, Any], tokens: float = 0.0) -> Score:
    """A `Measured`, as figures take it."""
    units, samples = measured["units"], measured["samples"]
    return Score(measured["value"], measured["low"], measured["high"], units, samples, tokens)


def _draw_domains(shown: list[Checkpoint], figure: Figure) -> bool:
    """PhyX by domain, a color for each checkpoint (report, figure 3)."""
    by_domain = {
        one.name: found["labels"].get("domain", {})
        for one in shown
        if (found := one.slow(DOMAINS)) is not None
    }
    domains = sorted({name for found in by_domain.values() for name in found})
    if not domains:
        return False
    axes = figure.subplots()
    width = 0.4 / max(1, len(by_domain) - 1)
    for i, (name, found) in enumerate(by_domain.items()):
        label: str | None = name
        shift = (i - (len(by_domain) - 1) / 2) * width
        for at, domain in enumerate(domains):
            if domain in found:
                color = ARM_COLORS[i % len(ARM_COLORS)]
                interval_point(axes, at + shift, Score(**found[domain]), color, label=label)
                label = None
    names = [name.replace("/", "/\n").replace(" ", "\n") for name in domains]
    axes.set_xticks(range(len(domains)), names)
    axes.set(title=f"{BENCHMARKS[DOMAINS].title} by domain")
    axes.set_ylabel("Accuracy (%, 95 % interval)")
    axes.set_xlim(-0.6, len(domains) - 0.4)
    axes.grid(visible=False, axis="x")
    _from_zero(axes)
    axes.legend(loc="best")
    return True


def _draw_entropy(shown: list[Checkpoint], figure: Figure) -> bool:
    """Critical-token entropy against the mean score of each checkpoint (report, figure 5).

    Both are of the benchmarks that all of them have answered with known entropies.
    """
    having = [(one, _with_entropy(one)) for one in shown]
    having = [(one, keys) for one, keys in having if keys]
    common = sorted(set.intersection(*(keys for _, keys in having))) if having else []
    if len(having) < 2 or not common:
        return False
    entropies = [_critical_entropy(one, common) for one, _ in having]
    means = [_mean([_score(one.scores[key]["slow"]["score"]) for key in common])
             for one, _ in having]  # fmt: skip
    axes = figure.subplots()
    for entropy, mean in zip(entropies, means, strict=True):
        interval_point(axes, entropy, mean, ARM_COLORS[0])
    title = correlation_title(correlation(entropies, [mean.accuracy for mean in means]))
    names = ", ".join(BENCHMARKS[key].title for key in common[:3])
    more = f" and {len(common) - 3} more" if len(common) > 3 else ""
    axes.set(title=f"{title} on {names}{more}", xlabel="Entropy at critical tokens (nats)")
    of = "Score" if len(common) == 1 else f"Mean score of {len(common)} benchmarks"
    axes.set_ylabel(f"{of} (%, 95 % interval)")
    axes.margins(x=0.16, y=0.14)
    figure.draw_without_rendering()
    points = [(x, 100 * mean.accuracy) for x, mean in zip(entropies, means, strict=True)]
    label_points(axes, points, [one.name for one, _ in having], set())
    return True


def _with_entropy(one: Checkpoint) -> set[str]:
    """Benchmarks on which the entropy at critical tokens is known."""
    return {
        key
        for key in one.scores
        if (found := one.slow(key)) is not None and found.get("critical_entropy") is not None
    }


def _critical_entropy(one: Checkpoint, keys: list[str]) -> float:
    """The mean over the critical tokens of some benchmarks, in nats."""
    found = [one.scores[key]["slow"] for key in keys]
    total = sum(each["critical_tokens"] * each["critical_entropy"] for each in found)
    return float(total / sum(each["critical_tokens"] for each in found))


def _mean(scores: list[Score]) -> Score:
    """The mean of scores of different benchmarks; each side of its interval adds up in squares."""
    n = len(scores)
    value = sum(one.accuracy for one in scores) / n
    below = math.hypot(*(one.accuracy - one.low for one in scores)) / n
    above = math.hypot(*(one.high - one.accuracy for one in scores)) / n
    return Score(value, value - below, value + above, 0, 0, 0.0)


def _draw_budgets(shown: tuple[Checkpoint, str], figure: Figure) -> bool:
    """Accuracy against a budget on one benchmark: cut off there, and closed by force (figure 9)."""
    one, key = shown
    modes = one.scores[key]
    closed, cut = (_by_budget(modes, prefix) for prefix in ("budget-", "cut-"))
    if max(len(closed), len(cut)) < 2:
        return False
    axes, color = figure.subplots(), MODE_COLORS["budget"]
    lines = [
        (name, dash, _score(modes[mode]["score"], modes[mode]["tokens"]))
        for mode, dash, name in UNBUDGETED
        if mode in modes
    ]
    budget_curves(axes, closed, cut, lines, color, "")
    if cut:
        low, high = ([100 * end for end in ends] for ends in
                     zip(*((s.low, s.high) for _, s in cut), strict=True))  # fmt: skip
        axes.fill_between([b for b, _ in cut], low, high, color=color, alpha=0.12, lw=0)
    budgets = sorted({b for b, _ in [*closed, *cut]})
    if budgets[-1] / budgets[0] > 4:
        axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.minorticks_off()
    axes.set(title=f"{BENCHMARKS[key].title}: {one.name} under a budget")
    axes.set(xlabel="Budget (tokens)", ylabel="Accuracy (%, 95 % interval)")
    _from_zero(axes)
    axes.legend(loc="best")
    return True


def _by_budget(modes: dict[str, dict[str, Any]], prefix: str) -> list[tuple[int, Score]]:
    """Scores of the modes of a prefix, by their number of tokens."""
    return sorted(
        (int(mode.removeprefix(prefix)), _score(found["score"], found["tokens"]))
        for mode, found in modes.items()
        if mode.startswith(prefix)
    )


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
