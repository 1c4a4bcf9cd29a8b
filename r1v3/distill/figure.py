"""The distribution of the data (report, figure 2): domains, difficulty, length."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r1v3.distill.account import Account, domain_rows
from r1v3.report.figure_style import MUTED, STAGE_COLORS, draw_png

_MOST_BARS = 16
ASKED, WRITTEN = "#c9ced6", STAGE_COLORS["grpo"]


def distribution_figure(account: Account, file: Path) -> Path | None:
    """Draw domains and pass rates; None where nothing was answered."""
    return draw_png(account, _draw, file)


def _draw(account: Account, figure: Figure) -> bool:
    if not account.pass_rates:
        return False
    grid = figure.add_gridspec(1, 2, width_ratios=(1.25, 1))
    _draw_domains(account, figure.add_subplot(grid[0, 0]))
    _draw_pass_rates(account, figure.add_subplot(grid[0, 1]))
    return True


def _draw_domains(account: Account, axes: Axes) -> None:
    rows = domain_rows(account)
    places = np.arange(len(rows))[::-1]
    asked, written = [row[1] for row in rows], [row[2] for row in rows]
    axes.barh(places + 0.2, asked, 0.4, color=ASKED, label="questions")
    axes.barh(places - 0.2, written, 0.4, color=WRITTEN, label="rows written")
    most = max([*asked, *written, 1])
    for place, count, kept in zip(places, asked, written, strict=True):
        for at, value in ((place + 0.2, count), (place - 0.2, kept)):
            axes.text(value + 0.012 * most, at, f"{value:,}", va="center", fontsize=9, color=MUTED)
    names = [row[0] if len(row[0]) <= 24 else row[0][:23] + "…" for row in rows]
    axes.set_yticks(places, names)
    axes.set_xlim(0, 1.16 * most)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set(title="Domains", xlabel="Count")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")


def _draw_pass_rates(account: Account, axes: Axes) -> None:
    parts = min(account.answers_each, _MOST_BARS)
    places = np.round(np.array(account.pass_rates) * parts).astype(int)
    counts = np.bincount(places, minlength=parts + 1)
    axes.bar(np.arange(parts + 1) / parts, counts, 0.8 / parts, color=WRITTEN)
    axes.set_xlim(-0.6 / parts, 1 + 0.6 / parts)
    axes.set(title="Pass rate of the questions", xlabel="Right answers / answers")
    axes.set_ylabel("Questions")
    axes.grid(axis="x", visible=False)
