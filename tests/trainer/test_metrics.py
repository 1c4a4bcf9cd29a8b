import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import r1v3
from r1v3.trainer.metrics import MetricsLogger, comparable, read_metrics


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def write_steps(logger: MetricsLogger, first: int, last: int) -> None:
    for step in range(first, last + 1):
        logger.log(step, {"loss": 1 / (step + 3), "entropy_histogram": [step, 1], "missing": None})


def test_every_line_is_strict_json_with_the_step_first(tmp_path: Path) -> None:
    """NaN, which Python would write by default, breaks every other JSON reader."""
    with MetricsLogger(tmp_path, "grpo", tensorboard=False) as logger:
        logger.log(3, {"nan": math.nan, "inf": -math.inf, "none": None, "list": [1, math.nan]})
        scalars: dict[str, Any] = {"float32": np.float32(0.5), "int64": np.int64(4)}
        logger.log(7, {**scalars, "loss": 0.1 + 0.2})
    lines = (tmp_path / "metrics" / "grpo.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    assert parsed == [
        {"step": 3, "nan": None, "inf": None, "none": None, "list": [1, None]},
        {"step": 7, "float32": 0.5, "int64": 4, "loss": 0.1 + 0.2},
    ]
    assert all(line.startswith('{"step": ') for line in lines)
    assert read_metrics(logger.path) == parsed


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, "sft", tensorboard=False) as logger:
        logger.log(1, {"loss": 2.0})
        assert read_metrics(logger.path) == [{"step": 1, "loss": 2.0}]


def test_kill_loses_no_logged_line_and_the_resumed_file_is_the_uninterrupted_one(
    tmp_path: Path,
) -> None:
    """A real process dies by SIGKILL at step 7; training resumes from the checkpoint of step 5."""
    program = textwrap.dedent(
        """
        import os, signal, sys
        from r1v3.trainer.metrics import MetricsLogger
        logger = MetricsLogger(sys.argv[1], "grpo", tensorboard=False)
        for step in range(1, 8):
            values = {"loss": 1 / (step + 3), "entropy_histogram": [step, 1], "missing": None}
            logger.log(step, values)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "killed")],
        cwd=Path(r1v3.__path__[0]).parent,
    )
    assert killed.returncode == -9
    path = tmp_path / "killed" / "metrics" / "grpo.jsonl"
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 8))
    with MetricsLogger(tmp_path / "killed", "grpo", resume_after=5, tensorboard=False) as logger:
        assert [line["step"] for line in read_metrics(path)] == list(range(1, 6))
        write_steps(logger, 6, 10)
    with MetricsLogger(tmp_path / "whole", "grpo", tensorboard=False) as logger:
        write_steps(logger, 1, 10)
    assert path.read_bytes() == logger.path.read_bytes()


@pytest.mark.parametrize(
    "torn", [b'{"step": 6, "lo', b"\x00\x00\x00", b"17", b"{}", b'{"step": 6}', b'{"step": "6"}']
)
@pytest.mark.parametrize("resume_after", [5, 9])
def test_a_torn_last_line_is_left_out_and_removed_on_resume(
    tmp_path: Path, torn: bytes, resume_after: int
) -> None:
    """Appending after half a line would glue two records into one unreadable line."""
    with MetricsLogger(tmp_path, "grpo", tensorboard=False) as logger:
        write_steps(logger, 1, 5)
    with open(logger.path, "ab") as file:
        file.write(torn)
    complete = torn == b'{"step": 6}'
    assert [line["step"] for line in read_metrics(logger.path)] == [1, 2, 3, 4, 5] + [6] * complete
    with MetricsLogger(tmp_path, "grpo", resume_after=resume_after, tensorboard=False) as logger:
        logger.log(10, {"loss": 0.0})
    kept = [1, 2, 3, 4, 5] + [6] * (complete and resume_after == 9)
    assert [line["step"] for line in read_metrics(logger.path)] == [*kept, 10]
    assert logger.path.read_bytes().count(b"\n") == len(kept) + 1


@pytest.mark.parametrize("broken", [b"{oops\n", b"[1]\n", b'{"loss": 1}\n', b"\n"])
def test_a_broken_line_in_the_middle_is_named_and_nothing_is_dropped(
    tmp_path: Path, broken: bytes
) -> None:
    """Only the last line can be torn by a kill; any other damage must not vanish silently."""
    path = tmp_path / "metrics" / "grpo.jsonl"
    path.parent.mkdir()
    content = b'{"step": 1}\n' + broken + b'{"step": 2}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"grpo\.jsonl line 2 "):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"grpo\.jsonl line 2 "):
        MetricsLogger(tmp_path, "grpo", resume_after=1, tensorboard=False)
    assert path.read_bytes() == content


def test_starting_over_does_not_mix_two_runs_and_keeps_the_old_file(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with MetricsLogger(tmp_path, "sft", tensorboard=False) as logger:
            logger.log(1, {"loss": loss})
    assert read_metrics(logger.path) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "metrics" / "sft.jsonl.previous") == [{"step": 1, "loss": 1.0}]


def test_resuming_where_nothing_was_logged_starts_a_file(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, "sft", resume_after=4, tensorboard=False) as logger:
        logger.log(5, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(logger.path)] == [5]


def test_steps_must_increase_also_across_a_resume(tmp_path: Path) -> None:
    """A step logged twice would give a resumed run other lines than an uninterrupted one."""
    with MetricsLogger(tmp_path, "sft", tensorboard=False) as logger:
        logger.log(4, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 4 was logged after step 4"):
            logger.log(4, {"loss": 1.0})
    with MetricsLogger(tmp_path, "sft", resume_after=4, tensorboard=False) as logger:
        with pytest.raises(ValueError, match="step 3 was logged after step 4"):
            logger.log(3, {"loss": 1.0})
    assert len(read_metrics(logger.path)) == 1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"loss": "low"}, "'loss'"),
        ({"loss": torch.tensor(1.0)}, "'loss'"),
        ({"counts": [1, "two"]}, "'counts'"),
        ({"step": 3}, '"step"'),
        ({"x_histogram": [1.5, 2]}, "'x_histogram'"),
        ({"x_histogram": [1, -2]}, "'x_histogram'"),
    ],
)
def test_a_bad_value_is_named_and_writes_nothing(
    tmp_path: Path, values: dict[str, float], named: str
) -> None:
    with MetricsLogger(tmp_path, "sft", tensorboard=False) as logger:
        with pytest.raises(ValueError, match=named):
            logger.log(1, {"fine": 1.0, **values})
        assert read_metrics(logger.path) == []
        logger.log(1, {"fine": 1.0})
    with pytest.raises(ValueError, match="closed"):
        logger.log(2, {"fine": 1.0})
    logger.close()


@pytest.mark.parametrize("stage", ["", "../sft", "a/b", ".hidden", "a b"])
def test_a_stage_name_cannot_leave_the_run_folder(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ValueError, match="stage"):
        MetricsLogger(tmp_path, stage, tensorboard=False)


def test_comparable_drops_wall_clock_and_nothing_else() -> None:
    lines = [{"step": 1, "seconds": 0.1, "seconds_rollout": 2.0, "loss": 0.3, "tokens": 5}]
    assert comparable(lines) == [{"step": 1, "loss": 0.3, "tokens": 5}]
    assert "seconds" in lines[0]


def test_tensorboard_shows_scalars_and_histograms_and_hides_redone_steps(tmp_path: Path) -> None:
    """Without purging, TensorBoard draws both attempts of the steps after a checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    edges = {"entropy_histogram": [0.0, 0.5, 2.0, 12.0]}
    for resume_after, factor in ((None, 1), (2, 10)):
        with MetricsLogger(
            tmp_path, "grpo", resume_after=resume_after, histogram_edges=edges
        ) as logger:
            for step in range((resume_after or 0) + 1, 5):
                logger.log(
                    step,
                    {
                        "loss": step * factor,
                        "gone": None,
                        "nan": math.nan,
                        "lengths": [3, 4],
                        "entropy_histogram": [2, 0, 1],
                        "empty_histogram": [0, 0],
                    },
                )
    events = EventAccumulator(
        str(tmp_path / "tensorboard" / "grpo"), size_guidance={"scalars": 0, "histograms": 0}
    ).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert events.Tags()["histograms"] == ["entropy_histogram"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    histogram = events.Histograms("entropy_histogram")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (3, 0.0, 12.0)
    # TensorBoard pairs each count with its upper limit; nothing lies below the lowest edge.
    pairs = [
        (limit, n)
        for limit, n in zip(histogram.bucket_limit, histogram.bucket, strict=True)
        if limit > 0
    ]
    assert pairs == [(0.5, 2), (2.0, 0), (12.0, 1)]


def test_histogram_edges_must_fit_the_counts(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, "grpo", histogram_edges={"a_histogram": [0.0, 1.0]}) as logger:
        with pytest.raises(ValueError, match="2 bins, which need 3 edges, got 2"):
            logger.log(1, {"a_histogram": [1, 2]})
        assert read_metrics(logger.path) == []


def test_importing_the_module_loads_no_torch() -> None:
    """The report reads metrics in a process that should not pay for torch."""
    program = "import sys, r1v3.trainer.metrics; sys.exit('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], cwd=Path(r1v3.__path__[0]).parent)
    assert finished.returncode == 0
