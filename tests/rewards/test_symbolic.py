r"""The child process that decides what arithmetic cannot: limits, threads, forks, signals."""

import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from r1v3.rewards import accuracy_reward
from r1v3.rewards.answers import answers_agree, read_answer
from r1v3.rewards.symbolic import _pool
from tests.processes import PATIENCE


def symbolically_equal(gold: str, answer: str) -> bool:
    """Formulas that only the child process can compare."""
    return answers_agree(read_answer(gold), read_answer(answer))


def test_a_comparison_that_would_not_end_is_ended_and_the_next_one_works() -> None:
    """Past the screen, a C-level power ignores signal handlers; the kernel must end the child."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    nine = b'["num", "9"]'
    tower = nine
    for _ in range(3):
        tower = b'["^", ' + nine + b', ["+", ' + tower + b', ["num", "0"]]]'
    assert _pool.ask(b'["within", ' + tower + b', ["within", "1", "1/2"]]\n') is None
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10
    assert symbolically_equal("2\\sqrt{5}", "\\sqrt{20}")


def test_works_in_threads_all_at_once() -> None:
    """A time-out by signals would raise outside the main thread."""
    results: list[tuple[float, float]] = []

    def grade(n: int) -> None:
        right = accuracy_reward(f"\\boxed{{{n}\\sqrt{{3}}}}", f"\\sqrt{{{3 * n * n}}}")
        wrong = accuracy_reward(f"\\boxed{{{n}\\sqrt{{3}}}}", f"\\sqrt{{{3 * n * n + 1}}}")
        results.append((right, wrong))

    threads = [threading.Thread(target=grade, args=(n,)) for n in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == [(1.0, 0.0)] * 8


def _in_child(grade: Callable[[], bool], queue: "multiprocessing.Queue[bool]") -> None:
    queue.put(grade())


def _grade_roots() -> bool:
    return all(symbolically_equal(f"{n}\\sqrt{{7}}", f"\\sqrt{{{7 * n * n}}}")
               for n in range(2, 12))  # fmt: skip


def test_a_forked_process_does_not_share_its_parents_pipe() -> None:
    """Data-loader workers fork; two users of one pipe would read each other's replies."""
    assert symbolically_equal("2\\sqrt{11}", "\\sqrt{44}")
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[bool] = context.Queue()
    children = [context.Process(target=_in_child, args=(_grade_roots, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=PATIENCE) for _ in children] == [True, True]
    for child in children:
        child.join(PATIENCE)
    assert symbolically_equal("3\\sqrt{11}", "\\sqrt{99}")


def test_the_child_ends_with_its_parent() -> None:
    """An orphan per killed trainer would fill a node."""
    program = (
        "import os, signal; from r1v3.rewards.symbolic import _pool;"
        "from tests.rewards.test_symbolic import symbolically_equal;"
        "assert symbolically_equal('2\\\\sqrt{3}', '\\\\sqrt{12}');"
        "print(_pool.workers[0].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=PATIENCE)
    pid = int(run.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return  # ended, and waiting for a reaper that this machine may not have
        time.sleep(0.1)
    pytest.fail(f"process {pid} outlived its parent")


def test_a_signal_to_the_process_group_does_not_end_the_child() -> None:
    """torchrun sends SIGTERM to all that a rank has started; the step under way would be scored 0,
    or fail."""
    program = (
        "import os, signal; from tests.rewards.test_symbolic import symbolically_equal;"
        "signal.signal(signal.SIGTERM, lambda *_: None);"
        "assert symbolically_equal('2\\\\sqrt{3}', '\\\\sqrt{12}');"
        "os.killpg(0, signal.SIGTERM);"
        "assert symbolically_equal('2\\\\sqrt{3}', '\\\\sqrt{12}')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        timeout=PATIENCE,
        start_new_session=True,
    )
    assert run.returncode == 0, run.stderr


def test_a_missing_sympy_is_an_error_and_not_a_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Scoring everything 0.0 because a package is missing would look like a policy that fails."""
    broken = f"{tmp_path}/sympy.py"
    with open(broken, "w") as file:
        file.write("raise ImportError('no sympy here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = (
        "from r1v3.rewards import accuracy_reward\n"
        "try: accuracy_reward('\\\\boxed{2y}', '2x')\n"
        "except RuntimeError as error: print(error)"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "no sympy here" in run.stdout, run.stderr


def test_rewards_load_no_torch_and_no_http_client() -> None:
    """Reward workers are small processes; torch would cost each of them seconds and memory."""
    program = (
        "import sys, r1v3.rewards as r; r.accuracy_reward('\\\\boxed{2x}', 'x+x');"
        "print([m for m in ('torch', 'sympy', 'httpx', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
