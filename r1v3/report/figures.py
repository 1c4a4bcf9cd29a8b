"""The figures of a run, one function each: its PNG, or None when the run has no data for it."""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r1v3.evaluation.statistics import Correlation, Score
from r1v3.report.figure_style import (
    INK,
    MODE_COLORS,
    MUTED,
    PART_COLORS,
    STAGE_COLORS,
    at_least,
    draw_png,
    interval_point,
    label_points,
    log_y,
    raw_and_mean,
)
from r1v3.report.run_folder import (
    STAGE_NAMES,
    RunFolder,
    checkpoints,
    entropy_correlation,
    number,
    series,
)
from r1v3.report.tables import MODE_NAMES, Row, main_stage, mode_budget, mode_rows


def reward_figure(run: RunFolder, out: Path) -> Path | None:
    """Reward and accuracy of the GRPO samples, and validation accuracy, over steps."""
    return draw_png(run, _draw_reward, out / "reward.png")


def _draw_reward(run: RunFolder, figure: Figure) -> bool:
    axes = figure.subplots()
    drawn = False
    lines = (("reward", MUTED, "Reward"), ("accuracy", STAGE_COLORS["grpo"], "Accuracy, training"))
    for key, color, label in lines:
        steps, values = series(run.grpo, key)
        if steps:
            raw_and_mean(axes, steps, values, color, label)
            drawn = True
    legend: str | None = "Accuracy, validation (95 % interval)"
    for record in run.grpo:
        step, accuracy = number(record.get("step")), number(record.get("validation_accuracy"))
        if step is None or accuracy is None:
            continue
        ends = number(record.get("validation_low")), number(record.get("validation_high"))
        low, high = (accuracy if end is None else end for end in ends)
        axes.errorbar(
            [step],
            [accuracy],
            yerr=[[max(accuracy - low, 0.0)], [max(high - accuracy, 0.0)]],
            fmt="D",
            color="#D55E00",
            ms=6.5,
            capsize=3,
            label=legend,
            zorder=5,
        )
        drawn, legend = True, None
    if not drawn:
        return False
    axes.set(title="Reward and accuracy during GRPO", xlabel="GRPO step")
    axes.set_ylabel("Reward, or fraction of correct answers")
    at_least(axes, 0.2, 0.0, 1.02)
    axes.legend(loc="best")
    return True


def selection_figure(run: RunFolder, out: Path) -> Path | None:
    """Critical-token entropy and validation accuracy of the checkpoints (report, figure 5)."""
    return draw_png(run, _draw_selection, out / "selection.png")


def _draw_selection(run: RunFolder, figure: Figure) -> bool:
    found = checkpoints(run.selection)
    if not found:
        return False
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    scatter = figure.add_subplot(grid[:, 0])
    for c in found:
        score = Score(c.accuracy, c.low, c.high, 0, 0, 0.0)
        color = STAGE_COLORS["selected"] if c.selected else STAGE_COLORS["grpo"]
        interval_point(scatter, c.entropy, score, color, "*" if c.selected else "o")
        if c.selected:
            x, y = [c.entropy], [100 * c.accuracy]
            scatter.plot(x, y, "*", color=color, ms=17, zorder=6, label="selected")
    scatter.margins(x=0.16, y=0.12)
    scatter.set_xlabel("Entropy at critical tokens (nats); labels are GRPO steps")
    scatter.set_ylabel("Validation accuracy (%)")
    scatter.set_title(correlation_title(entropy_correlation(found)))
    top, bottom = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    steps = [c.step for c in found]
    top.plot(steps, [100 * c.accuracy for c in found], "o-", color=STAGE_COLORS["grpo"], ms=5)
    top.set(title="Over GRPO steps", ylabel="Accuracy (%)")
    bottom.plot(steps, [c.entropy for c in found], "o-", color=INK, ms=5, label="at the token")
    after = [(c.step, c.entropy_after) for c in found if c.entropy_after is not None]
    if after:
        bottom.plot(*zip(*after, strict=True), "s--", color=MUTED, ms=5, label="after the token")
    bottom.set(xlabel="GRPO step", ylabel="Entropy (nats)")
    bottom.legend(loc="best")
    for axes in (top, bottom):
        for c in found:
            if c.selected:
                axes.axvline(c.step, color=STAGE_COLORS["selected"], lw=1.5, alpha=0.7, zorder=0)
    names = [f"{c.step:g}" for c in found]
    chosen = {i for i, c in enumerate(found) if c.selected}
    if chosen:
        scatter.legend(loc="best")
    figure.draw_without_rendering()
    label_points(scatter, [(c.entropy, 100 * c.accuracy) for c in found], names, chosen)
    return True


def correlation_title(measured: Correlation) -> str:
    """A rank correlation over checkpoints, as a title."""
    if measured.spearman is None:
        return f"Spearman's ρ undefined (n = {measured.n} checkpoints)"
    return f"Spearman's ρ = {measured.spearman:+.2f} (n = {measured.n} checkpoints)"


def histogram_figure(run: RunFolder, out: Path) -> Path | None:
    """Token entropy at several GRPO steps, and the fraction of high entropy (report, figure 10)."""
    return draw_png(run, _draw_histogram, out / "entropy_histogram.png")


def histograms(run: RunFolder) -> list[tuple[float, np.ndarray, float | None]]:
    """(step, counts [bins], high-entropy fraction) of the steps whose histogram fits the edges."""
    found = []
    for record in run.grpo:
        step, counts = number(record.get("step")), record.get("entropy_histogram")
        if step is None or not isinstance(counts, list):
            continue
        values = [number(c) for c in counts]
        bins = [v for v in values if v is not None and v >= 0]
        if len(bins) != len(counts) or len(bins) + 1 != len(run.histogram_edges) or not sum(bins):
            continue
        found.append((step, np.array(bins), number(record.get("high_entropy_share"))))
    return sorted(found, key=lambda entry: entry[0])


def _draw_histogram(run: RunFolder, figure: Figure) -> bool:
    found = histograms(run)
    if not found:
        return False
    axes = figure.subplots()
    edges = np.array(run.histogram_edges)
    chosen = sorted({round(i) for i in np.linspace(0, len(found) - 1, min(5, len(found)))})
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(chosen)))
    for shade, index in zip(shades, chosen, strict=True):
        step, counts, high = found[index]
        percent = 100 * counts / counts.sum()
        above = "" if high is None else f": {100 * high:.3g} % above {run.high_entropy_nats:g} nats"
        axes.stairs(
            np.where(percent > 0, percent, np.nan),
            edges,
            color=shade,
            lw=2,
            label=f"step {step:g}{above}",
        )
    log_y(axes)
    axes.set(title="Entropy of generated tokens", xlabel="Entropy (nats)")
    axes.set_ylabel("Tokens per bin (%, log scale)")
    used = max(int(np.nonzero(counts)[0][-1]) for _, counts, _ in found)
    _entropy_limits(axes, run, float(edges[0]), float(edges[used + 1]))
    axes.legend(loc="upper right", bbox_to_anchor=(0.96, 1.0))
    return True


def _entropy_limits(axes: Axes, run: RunFolder, low: float, used: float) -> None:
    """Mark the high-entropy threshold where it can be reached; else mark ln V and say so."""
    threshold = run.high_entropy_nats
    vocabulary = number(run.summary.get("vocabulary"))
    most = math.log(vocabulary) if vocabulary is not None and vocabulary > 1 else None
    if most is None or most > threshold:
        axes.axvline(threshold, color=INK, lw=1.2, ls="--")
        axes.set_xlim(low, max(used, threshold) * 1.05)
        return
    axes.axvline(most, color=INK, lw=1.2, ls="--")
    axes.set_xlim(low, max(used, most) * 1.02)
    note = (
        f"largest possible: ln({vocabulary:.0f}) = {most:.2f} nats,\n"
        f"so no token can pass {threshold:g} nats"
    )
    axes.annotate(
        note,
        (most, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=MUTED,
        fontsize=10,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
    )


def modes_figure(run: RunFolder, out: Path) -> Path | None:
    """Accuracy against tokens per response of the decoding modes (report, table 4, figure 9)."""
    return draw_png(run, _draw_modes, out / "modes.png")


def _draw_modes(run: RunFolder, figure: Figure) -> bool:
    rows = mode_rows(run.summary)
    panels = [("In-domain", [(r, r.in_domain) for r in rows])]
    panels.append(("Out-of-domain", [(r, r.out_of_domain) for r in rows]))
    kept = [(n, [(r, s) for r, s in p if s is not None]) for n, p in panels]
    kept = [(name, points) for name, points in kept if len(points) > 1]
    if not kept:
        return False
    grid = figure.subplots(1, len(kept), sharey=True, squeeze=False)[0]
    stage = main_stage(run.summary) or ""
    for axes, (name, points) in zip(grid, kept, strict=True):
        budgets = sorted(
            (s.tokens, s.accuracy) for r, s in points if mode_budget(r.key) is not None
        )
        axes.plot(
            [t for t, _ in budgets],
            [100 * a for _, a in budgets],
            "-",
            color=MODE_COLORS["budget"],
            lw=1.2,
            alpha=0.6,
        )
        for row, s in points:
            interval_point(axes, s.tokens, s, _mode_color(row), _mode_marker(row))
        axes.set(title=name, xlabel="Tokens per response (mean)")
        axes.margins(x=0.16, y=0.08)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    grid[0].set_ylabel("Accuracy (%)")
    grid[0].set_ylim(bottom=min(-3.0, grid[0].get_ylim()[0]))
    figure.suptitle(
        f"Accuracy against response length: {STAGE_NAMES.get(stage, stage)}",
        x=0.015,
        ha="left",
        fontsize=12.5,
    )
    figure.draw_without_rendering()
    for axes, (_, points) in zip(grid, kept, strict=True):
        names = [_short_mode(row) for row, _ in points]
        label_points(axes, [(s.tokens, 100 * s.accuracy) for _, s in points], names, set())
    return True


def _mode_color(row: Row) -> str:
    key = "budget" if mode_budget(row.key) is not None else row.key
    return MODE_COLORS.get(key, MODE_COLORS["other"])


def _mode_marker(row: Row) -> str:
    return {"slow": "o", "nothink": "X", "nowait": "^"}.get(row.key, "s")


def _short_mode(row: Row) -> str:
    budget = mode_budget(row.key)
    return f"{budget}" if budget is not None else MODE_NAMES.get(row.key, row.key)


def budget_figure(run: RunFolder, out: Path) -> Path | None:
    """Accuracy against the thinking budget, slow thinking as reference (report, figure 9)."""
    return draw_png(run, _draw_budget, out / "budget.png")


def _draw_budget(run: RunFolder, figure: Figure) -> bool:
    rows = mode_rows(run.summary)
    axes = figure.subplots()
    drawn: list[int] = []
    sets = (("in_domain", "In-domain", "o", "-"), ("out_of_domain", "Out-of-domain", "s", "--"))
    for (attribute, name, marker, dash), color in zip(sets, ("#0072B2", "#D55E00"), strict=True):
        points = [(mode_budget(r.key), getattr(r, attribute)) for r in rows]
        known = [(b, s) for b, s in points if b is not None and s is not None]
        if len(known) < 2:
            continue
        for i, (budget, s) in enumerate(known):
            interval_point(axes, budget, s, color, marker, None if i else f"{name}, budget")
        line = [100 * s.accuracy for _, s in known]
        axes.plot([b for b, _ in known], line, dash, color=color, lw=1.6)
        drawn.extend(b for b, _ in known)
        for slow in (getattr(r, attribute) for r in rows if r.key == "slow"):
            if slow is not None:
                label = f"{name}, slow ({slow.tokens:.0f} tokens)"
                axes.axhline(100 * slow.accuracy, color=color, lw=1.2, ls=":", label=label)
                axes.axhspan(100 * slow.low, 100 * slow.high, color=color, alpha=0.10, lw=0)
    if not drawn:
        return False
    stage = main_stage(run.summary) or ""
    axes.set(title=f"Accuracy under a thinking budget: {STAGE_NAMES.get(stage, stage)}")
    axes.set(xlabel="Thinking budget (tokens)", ylabel="Accuracy (%, 95 % interval)")
    budgets = sorted(set(drawn))
    if budgets[0] > 0 and budgets[-1] / budgets[0] > 4:
        axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.minorticks_off()
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
    axes.legend(loc="best")
    return True


def loss_figure(run: RunFolder, out: Path) -> Path | None:
    """Training and validation loss of the two supervised stages."""
    return draw_png(run, _draw_loss, out / "loss.png")


def _draw_loss(run: RunFolder, figure: Figure) -> bool:
    stages = [(s, r) for s, r in (("sft", run.sft), ("connector", run.connector))]
    stages = [(s, r) for s, r in stages if series(r, "loss")[0] or series(r, "validation_loss")[0]]
    if not stages:
        return False
    for axes, (stage, records) in zip(
        figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True
    ):
        steps, values = series(records, "loss")
        if steps:
            raw_and_mean(axes, steps, values, STAGE_COLORS[stage], "Training")
        checked, held_out = series(records, "validation_loss")
        if checked:
            axes.plot(checked, held_out, "D-", color=INK, ms=6, lw=1.4, label="Validation")
        everything = [v for v in values + held_out if v > 0]
        if everything and max(everything) / min(everything) > 20:
            log_y(axes)
        axes.set(title=STAGE_NAMES[stage], xlabel="Optimizer step")
        axes.legend(loc="best")
        scale = ", log scale" if axes.get_yscale() == "log" else ""
        axes.set_ylabel(f"Loss (nats per token{scale})")
    return True


def gradient_figure(run: RunFolder, out: Path) -> Path | None:
    """Gradient norm of vision encoder, connector and language model over GRPO steps."""
    return draw_png(run, _draw_gradient, out / "gradient_norm.png")


def _draw_gradient(run: RunFolder, figure: Figure) -> bool:
    axes = figure.subplots()
    names = (("vision", "Vision encoder"), ("connector", "Connector"), ("llm", "Language model"))
    frozen = []
    for part, name in names:
        steps, values = series(run.grpo, f"grad_norm_{part}")
        positive = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
        if positive:
            at, norms = (list(column) for column in zip(*positive, strict=True))
            raw_and_mean(axes, at, norms, PART_COLORS[part], name)
        elif steps:
            frozen.append(name.lower())
    if not axes.lines:
        return False
    note = f" (zero throughout: {', '.join(frozen)})" if frozen else ""
    log_y(axes)
    axes.set(title=f"Gradient norm of each part during GRPO{note}", xlabel="GRPO step")
    axes.set_ylabel("L2 norm (log scale)")
    axes.legend(loc="best")
    return True


def length_figure(run: RunFolder, out: Path) -> Path | None:
    """Mean response length and the fraction of responses cut off, over GRPO steps."""
    return draw_png(run, _draw_length, out / "response_length.png")


def _draw_length(run: RunFolder, figure: Figure) -> bool:
    steps, values = series(run.grpo, "response_length")
    if not steps:
        return False
    cut_at, cut = series(run.grpo, "truncated")
    panels = figure.subplots(
        2 if cut_at else 1,
        1,
        sharex=True,
        squeeze=False,
        height_ratios=(3, 1) if cut_at else (1,),
    )[:, 0]
    raw_and_mean(panels[0], steps, values, STAGE_COLORS["grpo"], "Response length")
    panels[0].set(title="Response length during GRPO", ylabel="Tokens per response (mean)")
    at_least(panels[0], 0.2 * max(values), 0.0)
    panels[0].legend(loc="best")
    if cut_at:
        scale, unit = (100.0, "%") if max(cut) <= 1 else (1.0, "responses")
        panels[1].plot(cut_at, [scale * c for c in cut], "o", color=MUTED, ms=3.6, mew=0)
        panels[1].set_ylabel(f"Cut off ({unit})")
        panels[1].set_ylim(-2, max(10.0, 1.1 * scale * max(cut)))
    panels[-1].set_xlabel("GRPO step")
    return True
