"""The figures of a study, drawn like those of a run."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r1v3.config import StudyFigure, modes_of
from r1v3.report.figure_style import (
    ARM_COLORS,
    MODE_COLORS,
    UNBUDGETED,
    budget_curves,
    draw_png,
    interval_point,
    label_points,
    log_y,
    moving_average,
    smoothing_window,
)
from r1v3.report.tables import mode_budget, mode_name
from r1v3.study.measures import (
    checkpoint_pairs,
    evaluation,
    metric_lines,
    mode_score,
    series,
)
from r1v3.study.plan import Plan, Run
from r1v3.study.verdicts import scored_checkpoints

_AXIS_NAMES = {
    "reward": "Reward",
    "accuracy": "Accuracy of the samples",
    "validation_accuracy": "Validation accuracy",
    "response_length": "Tokens per response",
    "entropy": "Token entropy (nats)",
    "grad_norm": "Gradient norm",
    "grad_norm_vision": "Gradient norm, vision",
    "grad_norm_connector": "Gradient norm, connector",
    "grad_norm_llm": "Gradient norm, LLM",
    "critical_entropy": "Critical-token entropy (nats)",
    "logprob_advantage_covariance": "Cov(log-prob, advantage)",
    "high_entropy_share": "Share above the threshold",
}
_PANELS_A_ROW = 3


def write_figures(plan: Plan, folder: Path) -> list[tuple[StudyFigure, Path | None]]:
    """Draw the figures of a study as PNG into a folder; None for one without data."""
    drawn = []
    for n, figure in enumerate(plan.study.figures, start=1):
        painter = _Painter(plan, figure)
        file = folder / f"{n}-{figure.draw}.png"
        drawn.append((figure, draw_png(painter, _Painter.draw, file)))
    return drawn


class _Painter:
    """One figure of a study."""

    def __init__(self, plan: Plan, figure: StudyFigure) -> None:
        self.plan, self.figure = plan, figure
        self.arms = list(figure.arms or plan.study.arms)
        self.seeds = plan.study.seeds

    def draw(self, canvas: Figure) -> bool:
        """Draw it; return whether there was anything to draw."""
        draw = {
            "steps": self._steps,
            "scores": self._scores,
            "budgets": self._budgets,
            "checkpoints": self._checkpoints,
            "entropies": self._entropies,
        }[self.figure.draw]
        drawn = draw(canvas)
        if drawn:
            canvas.suptitle(self.figure.title, x=0.015, ha="left", fontsize=13)
        return drawn

    def color(self, arm: str) -> str:
        return ARM_COLORS[self.arms.index(arm) % len(ARM_COLORS)]

    def runs(self, arm: str) -> list[Run]:
        return [self.plan.run(arm, seed, self.figure.stage) for seed in self.seeds]

    def _steps(self, canvas: Figure) -> bool:
        shown = [of for of in self.figure.of if self._any_series(of)]
        if not shown:
            return False
        columns = min(_PANELS_A_ROW, len(shown))
        grid = canvas.subplots(-(-len(shown) // columns), columns, squeeze=False)
        for axes, of in zip(grid.flat, shown, strict=False):
            for arm in self.arms:
                self._metric(axes, arm, of)
            axes.set_title(_named(of), fontsize=11)
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_axis_off()
        for axes in list(grid.flat)[: len(shown)][-columns:]:
            axes.set_xlabel("Step")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        if len(labels) > 1:
            canvas.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        return True

    def _any_series(self, of: str) -> bool:
        return any(series(run, of)[0] for arm in self.arms for run in self.runs(arm))

    def _metric(self, axes: Axes, arm: str, of: str) -> None:
        """Every seed as a thin line, and the mean over the seeds, smoothed, as a thick one."""
        every = [series(run, of) for run in self.runs(arm)]
        found = [(steps, values) for steps, values in every if steps]
        if not found:
            return
        color = self.color(arm)
        for steps, values in found:
            axes.plot(steps, values, "-", color=color, lw=0.7, alpha=0.35)
        common = sorted(set.intersection(*(set(steps) for steps, _ in found)))
        tables = [dict(zip(steps, values, strict=True)) for steps, values in found]
        mean = [float(np.mean([table[step] for table in tables])) for step in common]
        marker = "o-" if len(common) < 8 else "-"
        smooth = moving_average(mean, smoothing_window(len(mean))) if mean else mean
        axes.plot(common, smooth, marker, color=color, lw=1.9, ms=4, label=arm)

    def _scores(self, canvas: Figure) -> bool:
        """Accuracy against tokens: a point for each mode, arm and seed."""
        axes = canvas.subplots()
        points, names = [], []
        several = len(self.arms) > 1
        for arm in self.arms:
            for run in self.runs(arm):
                for mode in evaluation(run).get("answers", {}):
                    found = mode_score(run, mode, self.figure.where)
                    if found is None:
                        continue
                    color = self.color(arm) if several else _mode_color(mode)
                    interval_point(axes, found.tokens, found, color, _mode_marker(mode))
                    points.append((found.tokens, 100 * found.accuracy))
                    names.append(f"{arm}, {mode_name(mode)}" if several else mode_name(mode))
        if not points:
            return False
        axes.set(xlabel="Tokens per response (mean)", ylabel="Accuracy (%, 95 % interval)")
        axes.margins(x=0.18, y=0.1)
        canvas.draw_without_rendering()
        label_points(axes, points, names, set())
        return True

    def _budgets(self, canvas: Figure) -> bool:
        """Accuracy against the budget: closed by force, and cut from the long run."""
        axes = canvas.subplots()
        drawn = False
        for arm in self.arms:
            for i, run in enumerate(self.runs(arm)):
                name = f"{arm}, " if len(self.arms) > 1 else ""
                drawn |= self._budget_lines(axes, run, self.color(arm), None if i else name)
        if not drawn:
            return False
        axes.set(xlabel="Budget (tokens)", ylabel="Accuracy (%, 95 % interval)")
        axes.legend(loc="best")
        return True

    def _budget_lines(self, axes: Axes, run: Run, color: str, label: str | None) -> bool:
        budgets = [b for b in map(mode_budget, modes_of(run.config)) if b is not None]
        closed = [(b, mode_score(run, f"budget-{b}", self.figure.where)) for b in budgets]
        known = [(b, s) for b, s in closed if s is not None]
        if not known:
            return False
        cut = [(b, mode_score(run, f"cut-{b}", self.figure.where)) for b in budgets]
        lines = [
            (name, dash, found)
            for mode, dash, name in UNBUDGETED
            if (found := mode_score(run, mode, self.figure.where)) is not None
        ]
        kept = [(b, s) for b, s in cut if s is not None]
        budget_curves(axes, known, kept, lines, color, label)
        return True

    def _checkpoints(self, canvas: Figure) -> bool:
        """Critical-token entropy against the accuracy of every checkpoint, a color for a seed."""
        one = next(c for c in self.plan.study.correlations if c.scores == self.figure.stage)
        axes = canvas.subplots()
        points, names = [], []
        for seed, color in zip(self.seeds, ARM_COLORS, strict=False):
            scores = scored_checkpoints(self.plan, one.arm, seed, one.scores)
            select = self.plan.run(one.arm, seed, one.select)
            entropies, _ = checkpoint_pairs(select, scores, one.of, one.where)
            label: str | None = f"seed {seed}"
            for entropy, (step, run) in zip(entropies, scores, strict=False):
                found = mode_score(run, "slow", one.where)
                if entropy is None or found is None:
                    continue
                interval_point(axes, entropy, found, color, label=label)
                points.append((entropy, 100 * found.accuracy))
                names.append(str(step))
                label = None
        if not points:
            return False
        axes.set_xlabel(f"{_named(one.of)}; labels are GRPO steps")
        axes.set_ylabel("Accuracy (%, 95 % interval)")
        axes.margins(x=0.12, y=0.1)
        axes.legend(loc="best")
        canvas.draw_without_rendering()
        label_points(axes, points, names, set())
        return True

    def _entropies(self, canvas: Figure) -> bool:
        """Distributions of token entropies at several steps, summed over the seeds."""
        from r1v3.trainer.critical_tokens import ENTROPY_BIN_EDGES

        counts: dict[int, np.ndarray] = {}
        for run in self.runs(self.arms[0]):
            for line in metric_lines(run):
                found = np.array(line.get("entropy_histogram") or [0])
                if len(found) + 1 == len(ENTROPY_BIN_EDGES) and found.sum():
                    counts[line["step"]] = counts.get(line["step"], 0) + found
        if not counts:
            return False
        axes, steps = canvas.subplots(), sorted(counts)
        chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(5, len(steps)))})
        shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(chosen)))
        for shade, index in zip(shades, chosen, strict=True):
            percent = 100 * counts[steps[index]] / counts[steps[index]].sum()
            drawn = np.where(percent > 0, percent, np.nan)
            name = f"step {steps[index]}"
            axes.stairs(drawn, ENTROPY_BIN_EDGES, color=shade, lw=2, label=name)
        used = max(int(np.nonzero(found)[0][-1]) for found in counts.values())
        axes.set_xlim(0, ENTROPY_BIN_EDGES[used + 1])
        log_y(axes)
        axes.set(xlabel="Entropy (nats)", ylabel="Tokens per bin (%, log scale)")
        axes.legend(loc="upper right")
        return True


def _named(of: str) -> str:
    return _AXIS_NAMES.get(of, of.replace("_", " ").capitalize())


def _mode_color(mode: str) -> str:
    key = "budget" if mode_budget(mode) is not None else mode
    return MODE_COLORS.get(key, MODE_COLORS["other"])


def _mode_marker(mode: str) -> str:
    return {"slow": "o", "nothink": "X", "nowait": "^"}.get(mode, "s")
