"""Starting a job with the wrong number of processes, or the wrong engine, says what is right."""

import logging
import warnings
from pathlib import Path

import pytest
import torch

from r1v3.config import Parallel, Stage
from r1v3.engine.megatron.ranks import connect
from r1v3.trainer import stage


@pytest.mark.parametrize(
    ("processes", "tensor", "pipeline", "context"),
    [(4, 3, 1, 1), (2, 2, 2, 1), (6, 2, 2, 1), (4, 1, 1, 3), (4, 2, 2, 2)],
)
def test_a_number_of_processes_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, processes: int, tensor: int, pipeline: int, context: int
) -> None:
    """Fails if ranks would wait for others that nobody starts."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    ranks = tensor * pipeline * context
    wanted = f"does not divide the {processes} processes; start a multiple of {ranks} "
    with pytest.raises(ValueError, match=wanted):
        connect(Parallel(tensor=tensor, pipeline=pipeline, context=context))


def test_several_processes_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layout of two ranks would start as one."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="does not divide the 1 processes"):
        connect(Parallel(tensor=2))


@pytest.mark.parametrize("engine", ["hf", "megatron"])
def test_a_process_that_is_not_told_its_rank_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """Fails if every process of a job would train the same model into the same folder, or if the
    refusal leaves torch changed."""
    before = torch.empty, torch.cuda.current_device
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 and RANK is not set: .* with torchrun"):
        stage.connect(Stage.model_validate({"run": tmp_path, "engine": engine}))
    assert (torch.empty, torch.cuda.current_device) == before


@pytest.mark.parametrize(("rank", "shown"), [("0", 1), ("3", 0)])
def test_warnings_come_from_one_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, shown: int
) -> None:
    """Fails if a job of 64 ranks prints every warning 64 times, or never."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("logging.root.manager.disable", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage.connect(Stage.model_validate({"run": tmp_path}))
        warnings.warn("of the job", stacklevel=1)
    assert len(caught) == shown
    assert logging.getLogger("job").isEnabledFor(logging.WARNING) == bool(shown)
