"""Files that a thread writes while training goes on."""

import errno
import threading

import pytest

from r1v3.files import FileDigest
from r1v3.ranks import ALONE

pytest.importorskip("megatron.core")

from r1v3.engine.megatron.checkpoint import BackgroundWriting  # noqa: E402


def test_it_is_done_when_the_thread_is_and_finalized_once() -> None:
    """Fails if a checkpoint is put into place before its files are written, or finalized twice."""
    may_end, finalized = threading.Event(), []

    def write() -> dict[str, FileDigest]:
        may_end.wait()
        return {"a": (1, "00")}

    writing = BackgroundWriting(write, lambda: finalized.append(1), ALONE)
    assert not writing.done() and not finalized
    may_end.set()
    writing.wait()
    writing.wait()
    assert writing.done() and finalized == [1] and writing.digests == {"a": (1, "00")}


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(errno.ENOSPC, "no room"), r"\[Errno 28\] no room"),
        (KeyError("x"), r"writing a checkpoint failed: KeyError\('x'\)"),
    ],
)
def test_an_error_of_the_thread_is_that_of_the_save(error: Exception, wanted: str) -> None:
    """Fails if a full disk during the writing goes unnoticed, or loses its error number."""

    def write() -> dict[str, FileDigest]:
        raise error

    writing = BackgroundWriting(write, pytest.fail, ALONE)
    with pytest.raises((OSError, RuntimeError), match=wanted) as raised:
        writing.wait()
    assert getattr(raised.value, "errno", None) == getattr(error, "errno", None)
