import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from r1v3.report import figures
from r1v3.report.figure_style import DPI, SIZE_INCHES, STYLE, moving_average, smoothing_window
from r1v3.report.run_folder import RunFolder, read_run

Draw = Callable[[RunFolder, Figure], bool]

DRAW: dict[Callable[[RunFolder, Path], Path | None], Draw] = {
    figures.reward_figure: figures._draw_reward,
    figures.selection_figure: figures._draw_selection,
    figures.histogram_figure: figures._draw_histogram,
    figures.modes_figure: figures._draw_modes,
    figures.budget_figure: figures._draw_budget,
    figures.loss_figure: figures._draw_loss,
    figures.gradient_figure: figures._draw_gradient,
    figures.length_figure: figures._draw_length,
}


def drawn(run: RunFolder, figure_of: Callable[[RunFolder, Path], Path | None]) -> Figure:
    """The figure as it is just before it becomes a PNG."""
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        assert DRAW[figure_of](run, figure)
        figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> list[str]:
    """Every non-empty text of a figure: titles, labels, ticks, legends, notes."""
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [artist.get_text() for artist in found if artist.get_text()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("figure_of", list(DRAW), ids=lambda f: f.__name__)
def test_figure_is_a_png_of_the_agreed_size(
    example_run: Path, tmp_path: Path, figure_of: Callable[[RunFolder, Path], Path | None]
) -> None:
    """A blank or wrongly sized image would still be embedded in the report."""
    file = figure_of(read_run(example_run), tmp_path / "figures")
    assert file is not None
    with Image.open(file) as image:
        assert image.format == "PNG" and image.size == (2000, 1120)
        shades = np.asarray(image.convert("L"))
    assert shades[0, 0] == 255 and 0.005 < (shades < 250).mean() < 0.3
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("figure_of", list(DRAW), ids=lambda f: f.__name__)
def test_without_data_there_is_no_figure(
    tmp_path: Path, figure_of: Callable[[RunFolder, Path], Path | None]
) -> None:
    """Empty axes in the report would look like a result."""
    empty = RunFolder(path=tmp_path)
    junk: list[dict[str, Any]] = [{}, {"step": None, "loss": 1, "reward": 1}, {"step": 1}]
    for run in (empty, replace(empty, sft=junk, grpo=junk, connector=junk)):
        assert figure_of(run, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("figure_of", list(DRAW), ids=lambda f: f.__name__)
def test_axes_name_their_quantity_and_no_label_is_markup(
    example_run: Path, figure_of: Callable[[RunFolder, Path], Path | None]
) -> None:
    """Log ticks once came out as "$\\mathdefault{10^{-1}}$", since text is not parsed as maths."""
    figure = drawn(read_run(example_run), figure_of)
    assert not [text for text in texts(figure) if "$" in text or "\\" in text]
    columns = figure.axes[-1].get_subplotspec()
    assert columns is not None and figure.axes[-1].get_xlabel()
    assert all(a.get_ylabel() or a.get_shared_y_axes().get_siblings(a)[1:] for a in figure.axes)


def test_same_run_gives_the_same_bytes(example_run: Path, tmp_path: Path) -> None:
    run = read_run(example_run)
    files = [figures.length_figure(run, tmp_path / name) for name in ("a", "b")]
    assert files[0] is not None and files[1] is not None
    assert files[0].read_bytes() == files[1].read_bytes()


def test_moving_average_is_centered_and_reaches_both_ends() -> None:
    """A trailing mean would shift every curve to the right by half its window."""
    values = np.random.default_rng(0).normal(size=40)
    smooth = moving_average(list(values), 7)
    assert smooth[3:-3] == pytest.approx(np.convolve(values, np.ones(7) / 7, "valid"))
    assert smooth[0] == pytest.approx(values[:4].mean()) and len(smooth) == 40


@pytest.mark.parametrize(("count", "window"), [(1, 1), (19, 1), (20, 3), (60, 7), (400, 41)])
def test_smoothing_window_is_odd_and_about_a_tenth(count: int, window: int) -> None:
    assert smoothing_window(count) == window


def test_every_raw_value_is_drawn_under_its_mean(example_run: Path) -> None:
    """Smoothing alone would hide the scatter."""
    run = read_run(example_run)
    lines = drawn(run, figures.length_figure).axes[0].lines
    raw, mean = (np.asarray(line.get_ydata()) for line in lines)
    assert list(raw) == [r["response_length"] for r in run.grpo]
    assert "mean of 7 steps" in str(lines[1].get_label()) and np.std(mean) < np.std(raw)


def test_selection_title_states_the_measured_rho_and_n(example_run: Path) -> None:
    run = read_run(example_run)
    entries = run.selection["checkpoints"]
    rho = stats.spearmanr(
        [e["critical_entropy"] for e in entries], [e["validation_accuracy"] for e in entries]
    ).statistic
    figure = drawn(run, figures.selection_figure)
    title = figure.axes[0].get_title(loc="left")
    assert title == f"Spearman's ρ = {rho:+.2f} (n = 5 checkpoints)"
    labels = {t.get_text(): t for t in figure.axes[0].texts}
    assert set(labels) == {"12", "24", "36", "48", "60"}
    assert [name for name, t in labels.items() if t.get_fontweight() == "bold"] == ["48"]


def test_checkpoint_labels_stay_inside_the_axes_and_apart(example_run: Path) -> None:
    """Labels once ran over the axis and over each other."""
    run = read_run(example_run)
    for entry in run.selection["checkpoints"]:
        entry["critical_entropy"] = 1.0 + 0.001 * (entry["step"] % 36)
    axes = drawn(run, figures.selection_figure).axes[0]
    boxes = [t.get_window_extent() for t in axes.texts]
    frame = axes.get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)
    assert not [1 for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_two_checkpoints_have_no_correlation(example_run: Path) -> None:
    """Two points always give rho = 1 or -1, which means nothing."""
    run = read_run(example_run)
    del run.selection["checkpoints"][2:]
    title = drawn(run, figures.selection_figure).axes[0].get_title(loc="left")
    assert title == "Spearman's ρ undefined (n = 2 checkpoints)"


def test_small_vocabulary_says_that_the_threshold_is_out_of_reach(example_run: Path) -> None:
    """A share of 0 % above 6.8 nats would read as a finding where it is arithmetic."""
    run = read_run(example_run)
    figure = drawn(run, figures.histogram_figure)
    assert any("ln(64) = 4.16 nats" in t and "no token can pass 6.8" in t for t in texts(figure))
    assert any(t == "step 60: 0 % above 6.8 nats" for t in texts(figure))
    assert figure.axes[0].lines[0].get_xdata()[0] == pytest.approx(math.log(64))  # type: ignore[index]


def test_large_vocabulary_marks_the_threshold(example_run: Path) -> None:
    run = read_run(example_run)
    run.summary["vocabulary"] = 151_674
    run.grpo[-1]["high_entropy_share"] = 0.0123
    figure = drawn(run, figures.histogram_figure)
    assert figure.axes[0].lines[0].get_xdata()[0] == 6.8  # type: ignore[index]
    assert figure.axes[0].get_xlim()[1] > 6.8
    assert "step 60: 1.23 % above 6.8 nats" in texts(figure)
    assert not any("no token" in t for t in texts(figure))


def test_the_threshold_of_the_figure_is_that_of_the_run(example_run: Path) -> None:
    """Every run was labeled "above 6.8 nats", also where its configuration said otherwise."""
    (example_run / "config" / "grpo.yaml").write_text("monitor: {high_entropy_nats: 2.5}")
    run = read_run(example_run)
    figure = drawn(run, figures.histogram_figure)
    assert "step 60: 0 % above 2.5 nats" in texts(figure)
    assert figure.axes[0].lines[0].get_xdata()[0] == 2.5  # type: ignore[index]
    run = replace(run, high_entropy_nats=5.0)
    assert any("no token can pass 5 nats" in t for t in texts(drawn(run, figures.histogram_figure)))


def test_histograms_that_do_not_fit_the_edges_are_left_out(example_run: Path) -> None:
    run = read_run(example_run)
    run.grpo[0]["entropy_histogram"].pop()
    run.grpo[1]["entropy_histogram"][3] = None
    run.grpo[2]["entropy_histogram"] = [0] * 40
    run.grpo[3]["entropy_histogram"] = "40 bins"
    assert [step for step, _, _ in figures.histograms(run)] == list(range(5, 61))


def test_budget_curve_runs_over_all_budgets_with_slow_as_reference(example_run: Path) -> None:
    run = read_run(example_run)
    modes = run.summary["stages"]["connector"]["modes"]
    axes = drawn(run, figures.budget_figure).axes[0]
    expected = [
        100 * modes[f"budget-{b}"]["in_domain"]["accuracy"] for b in (8, 16, 24, 32, 48, 64)
    ]
    curves = [
        list(np.asarray(line.get_ydata())) for line in axes.lines if line.get_marker() == "None"
    ]
    assert any(curve == pytest.approx(expected) for curve in curves if len(curve) == 6)
    slow = 100 * modes["slow"]["in_domain"]["accuracy"]
    assert any(curve == pytest.approx([slow, slow]) for curve in curves if len(curve) == 2)
    assert axes.get_ylim()[0] <= 0


def test_frozen_part_is_named_and_does_not_break_the_log_axis(example_run: Path) -> None:
    run = read_run(example_run)
    for record in run.grpo:
        record["grad_norm_vision"] = 0.0
    title = drawn(run, figures.gradient_figure).axes[0].get_title(loc="left")
    assert title.endswith("(zero throughout: vision encoder)")


@pytest.mark.parametrize(("values", "unit"), [([0.0, 0.5], "%"), ([0, 12], "responses")])
def test_cut_off_responses_as_share_or_count(
    tmp_path: Path, values: list[float], unit: str
) -> None:
    """A count shown as a share would read 1200 %."""
    grpo = [{"step": i, "response_length": 40, "truncated": v} for i, v in enumerate(values)]
    axes = drawn(RunFolder(tmp_path, grpo=grpo), figures.length_figure).axes[1]
    assert axes.get_ylabel() == f"Cut off ({unit})"


def test_nulls_and_gaps_are_skipped(example_run: Path, tmp_path: Path) -> None:
    """JSON null and NaN in a metrics file must not end the report."""
    file = example_run / "metrics" / "grpo.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for i, line in enumerate(lines):
        for key in list(line)[1 + i % 3 :: 3]:
            line[key] = None if i % 2 else float("nan")
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 61, "rew')
    run = read_run(example_run)
    assert len(run.grpo) == 60
    assert figures.reward_figure(run, tmp_path) and figures.gradient_figure(run, tmp_path)
