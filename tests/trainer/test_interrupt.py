import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import r1v3
from r1v3.trainer.interrupt import StopRequest
from tests.processes import PATIENCE

STAGE = """
    import signal, sys, time
    from r1v3.trainer.interrupt import StopRequest

    # Under a shell's background job it would be ignored, and stay so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    print("start", flush=True)
    try:
        with StopRequest() as stop:
            for step in range(10_000):
                print("step", step, flush=True)
                end = time.monotonic() + 0.05
                while time.monotonic() < end:
                    time.sleep(0.001)
                print("done", step, flush=True)
                if stop.requested and "--deaf" not in sys.argv:
                    print("saved", step, flush=True)
                    break
    finally:
        after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        print("restored", after == before, flush=True)
"""


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STAGE), *arguments],
        cwd=Path(r1v3.__path__[0]).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    while (read := process.stdout.readline()) != line + "\n":
        assert read, f"the process ended without printing {line!r}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_finish_and_the_stage_save(number: signal.Signals) -> None:
    with start() as process:
        wait_for(process, "step 2")
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    step = int(out.split("saved ")[1].split()[0])
    assert out.splitlines()[-3:] == [f"done {step}", f"saved {step}", "restored True"]
    assert process.returncode == 0
    assert f"{number.name}: stopping after this step" in err


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(second: signal.Signals) -> None:
    """A stage that hangs in its step must still be stoppable without kill -9."""
    with start("--deaf") as process:
        wait_for(process, "step 1")
        process.send_signal(signal.SIGTERM)
        wait_for(process, "step 3")
        process.send_signal(second)
        out, err = process.communicate(timeout=PATIENCE)
    assert "KeyboardInterrupt" in err
    assert out.splitlines()[-1] == "restored True"
    assert process.returncode != 0


def test_without_a_signal_nothing_is_requested_and_handlers_come_back() -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError

    previous = signal.signal(signal.SIGTERM, own)
    try:
        stop = StopRequest()
        with stop:
            assert signal.getsignal(signal.SIGTERM) is not own
            assert not stop.requested
        assert signal.getsignal(signal.SIGTERM) is own
        with pytest.raises(RuntimeError), stop:
            raise RuntimeError
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_block_can_be_entered_again_with_a_clean_flag() -> None:
    stop = StopRequest()
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert stop.requested
    with stop:
        assert not stop.requested


def test_an_ignored_signal_stays_ignored() -> None:
    """`nohup` and shells' background jobs rely on it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, previous)


def test_off_the_main_thread_it_does_nothing() -> None:
    """signal.signal raises there; a stage run in a worker thread must still run."""
    outcome: list[object] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with StopRequest() as stop:
            outcome.extend([stop.requested, signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [False, True]
