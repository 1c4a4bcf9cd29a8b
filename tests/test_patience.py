"""A rank that works is not taken for one that has died."""

from pathlib import Path

from tests.processes import run_ranks


def test_ranks_wait_for_the_first_ones_work_and_for_nothing_else(tmp_path: Path) -> None:
    """Fails if a slow judge, disk or server kills a healthy job at the time limit of a collective;
    or if the limit no longer ends a job whose rank hangs."""
    run_ranks("tests.patient_ranks", 2, tmp_path)
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert first == "done, then lost peer"
    assert second == "done, then lost peer"
