"""Look of the figures: 1000 x 560 units on white, drawn at twice that for sharp screens and print.

Stages use colors of M. Okabe and K. Ito (2008), modes those of P. Tol's "muted" scheme; both can
be told apart with the common kinds of color blindness. Raw values are always drawn; a moving
average is only ever added on top of them.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from r1v3.evaluation.statistics import Score
from r1v3.files import write_bytes

INK = "#222222"
MUTED = "#6b6b6b"
STAGE_COLORS = {
    "base": "#8a8a8a",
    "sft": "#E69F00",
    "grpo": "#0072B2",
    "connector": "#009E73",
    "selected": "#CC79A7",
}
MODE_COLORS = {
    "slow": "#332288",
    "nothink": "#CC6677",
    "nowait": "#117733",
    "budget": "#44AA99",
    "other": "#6b6b6b",
}
# Variants of a study, in their order.
ARM_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#6b6b6b",
)  # fmt: skip
# Mode, dash and name of the lines that have no budget.
UNBUDGETED = (("slow", ":", "slow thinking"), ("nothink", "-.", "NoThink"))
PART_COLORS = {"vision": "#D55E00", "connector": "#009E73", "llm": "#0072B2"}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
}
SIZE_INCHES = (10.0, 5.6)
DPI = 200

Shown = TypeVar("Shown")


def draw_png(run: Shown, draw: Callable[[Shown, Figure], bool], file: Path) -> Path | None:
    """Call `draw` on an empty figure and write it as PNG; None when it found nothing to draw."""
    with rc_context(STYLE):
        margins = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=margins, facecolor="white")
        if not draw(run, figure):
            return None
        buffer = io.BytesIO()
        # No Software entry: the same run gives the same bytes with the same matplotlib.
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    write_bytes(file, buffer.getvalue())
    return file


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """Centered mean over `window` (odd) values, over fewer at the two ends. [n] float64."""
    array = np.asarray(values, dtype=np.float64)
    half = window // 2
    return np.array([array[max(0, i - half) : i + half + 1].mean() for i in range(len(array))])


def smoothing_window(count: int) -> int:
    """An odd window of about a tenth of the points; 1 (no smoothing) below 20 points."""
    return 1 if count < 20 else 2 * (count // 20) + 1


def raw_and_mean(
    axes: Axes, steps: list[float], values: list[float], color: str, label: str
) -> None:
    """Every value as a small point, and their moving average where there are points enough."""
    window = smoothing_window(len(values))
    if window == 1:
        axes.plot(steps, values, "o-", color=color, ms=3.5, lw=1.4, label=label)
        return
    axes.plot(steps, values, "o", color=color, ms=3.6, alpha=0.45, mew=0)
    smooth = moving_average(values, window)
    axes.plot(steps, smooth, "-", color=color, lw=2.2, label=f"{label} (mean of {window} steps)")


def interval_point(
    axes: Axes, x: float, score: Score, color: str, marker: str = "o", label: str | None = None
) -> None:
    """A score in percent at x with its 95 % interval."""
    below, above = score.accuracy - score.low, score.high - score.accuracy
    axes.errorbar(
        [x],
        [100 * score.accuracy],
        yerr=[[100 * max(below, 0.0)], [100 * max(above, 0.0)]],
        fmt=marker,
        color=color,
        ms=8,
        capsize=3,
        lw=1.4,
        label=label,
    )


def budget_curves(
    axes: Axes,
    closed: Sequence[tuple[int, Score]],
    cut: Sequence[tuple[int, Score]],
    lines: Sequence[tuple[str, str, Score]],
    color: str,
    label: str | None,
) -> None:
    """Accuracy against a budget: of thoughts closed by force, and of responses cut off there.

    Args:
        closed, cut: a score for each budget in tokens.
        lines: name, dash and score of what has no budget.
        label: stands in front of the names in the legend; None leaves them out.
    """
    for budget, found in closed:
        interval_point(axes, budget, found, color)
    for points, style, name in (
        (closed, "-", "thought closed by force"),
        (cut, "s--", "response cut off"),
    ):
        if points:
            at, values = zip(*((b, 100 * s.accuracy) for b, s in points), strict=True)
            shown = None if label is None else f"{label}{name}"
            alpha = 0.7 if points is cut else 1.0
            axes.plot(at, values, style, color=color, ms=5, alpha=alpha, label=shown)
    for name, dash, found in lines:
        shown = None if label is None else f"{label}{name} ({found.tokens:.0f} tokens)"
        axes.axhline(100 * found.accuracy, color=color, lw=1.2, ls=dash, label=shown)


def log_y(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def at_least(axes: Axes, span: float, floor: float = -np.inf, ceiling: float = np.inf) -> None:
    """Widen the y axis to at least `span`, so that noise does not fill it, within its limits."""
    low, high = axes.get_ylim()
    extra = max(0.0, span - (high - low)) / 2
    axes.set_ylim(max(low - extra, floor), min(high + extra, ceiling))


def label_points(
    axes: Axes, points: list[tuple[float, float]], labels: list[str], bold: set[int]
) -> None:
    """Write each label beside its point, where it hides least and stays inside the axes.

    Positions are those of the current axis limits: call this last.
    """
    pixels = axes.transData.transform(points)
    scale = DPI / 72
    frame = axes.get_window_extent()
    taken: list[tuple[float, float, float, float]] = []
    for (x, y), text, (px, py), i in zip(points, labels, pixels, range(len(labels)), strict=True):
        width, height = 6.6 * len(text) * scale, 12 * scale
        sides = ((9, -4, "left"), (-9, -4, "right"), (0, 11, "center"), (0, -20, "center"))
        best, fewest = sides[0], len(points) * 3 + 1
        for dx, dy, align in sides:
            left = px + dx * scale - {"left": 0, "right": width, "center": width / 2}[align]
            box = (left, py + dy * scale, left + width, py + dy * scale + height)
            hits = sum(_overlap(box, other) for other in taken)
            hits += sum(_overlap(box, (a - 8, b - 8, a + 8, b + 8)) for a, b in pixels)
            hits += len(points) * (box[0] < frame.x0 or box[2] > frame.x1)
            if hits < fewest:
                best, fewest, best_box = (dx, dy, align), hits, box
        taken.append(best_box)
        axes.annotate(
            text,
            (x, y),
            xytext=best[:2],
            textcoords="offset points",
            ha=best[2],
            fontsize=10,
            fontweight="bold" if i in bold else "normal",
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
