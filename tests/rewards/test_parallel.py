"""Answers judged on several cores at once: the same verdicts, and nobody pays for a slow one."""

import threading
import time
from pathlib import Path

import pytest

from r1v3.cores import cores_of_rank
from r1v3.rewards import score
from r1v3.rewards.combine import judge_all
from r1v3.rewards.rules import Judgement, judge
from r1v3.rewards.symbolic import _Pool


def equal_roots(first: int, count: int) -> list[tuple[str, str, None]]:
    return [
        (f"{n}\\sqrt{{13}}", f"\\sqrt{{{13 * n * n}}}", None) for n in range(first, first + count)
    ]


def test_verdicts_do_not_depend_on_the_others() -> None:
    """Fails if replies of one process are read for another's question, or order is lost."""
    cases = equal_roots(2, 9)
    cases += [(f"{n}\\sqrt{{13}}", f"\\sqrt{{{13 * n * n + 1}}}", None) for n in range(2, 11)]
    cases += [(None, "3", None), ("3", "3", None), ("B", "B", ("1", "2"))]  # type: ignore[list-item]
    expected = [True] * 9 + [False] * 9 + [False, True, True]
    assert [found.correct for found in judge_all(cases)] == expected
    alone = [
        Judgement(False) if case[0] is None else judge(case[0], case[1], options=case[2])
        for case in cases
    ]
    assert judge_all(cases) == alone
    assert judge_all([]) == []


def test_rewards_come_in_the_order_of_the_completions() -> None:
    """Fails if a completion gets its neighbour's reward."""
    texts = [f"So.\n</think>\n\n\\boxed{{{n}}}" for n in range(40)]
    rewards = score(texts, [str(n if n % 3 else n + 1) for n in range(40)])
    assert [reward.rule for reward in rewards] == [float(n % 3 > 0) for n in range(40)]


class Slow:
    """A worker that answers when it is let go, and counts who asks at the same time."""

    def __init__(self, together: threading.Barrier) -> None:
        self.together = together

    def ask(self, request: bytes) -> str:
        self.together.wait(60)
        return request.decode()

    def stop(self) -> None:
        pass


def test_as_many_questions_are_under_way_as_there_are_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if questions wait for each other, or more processes start than the pool may hold."""
    together = threading.Barrier(3)
    monkeypatch.setattr("r1v3.rewards.symbolic._Worker", lambda: Slow(together))
    pool, replies = _Pool(3), []
    threads = [
        threading.Thread(target=lambda n=n: replies.append(pool.ask(str(n).encode())))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(replies) == [str(n) for n in range(6)]
    assert len(pool.workers) == 3 == len(pool.idle)


def test_an_expression_that_is_killed_costs_the_others_nothing() -> None:
    """Fails if one hostile answer takes the verdicts of its batch with it."""
    hostile = ("\\sqrt{2}^{\\sqrt{2}^{\\sqrt{2}^{\\sqrt{3}^{19}}}}", "\\sqrt{7}", None)
    started = time.monotonic()
    found = judge_all([*equal_roots(50, 3), hostile, *equal_roots(60, 3)])
    assert [one.correct for one in found] == [True, True, True, False, True, True, True]
    assert time.monotonic() - started < 600


def test_every_core_that_may_be_used_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a container's limit is ignored, or the ranks of a machine share no cores."""
    machine = len(list(Path("/sys/devices/system/cpu").glob("cpu[0-9]*")) or [0] * 4096)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = cores_of_rank()
    assert 1 <= alone <= machine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert cores_of_rank() == 1
