import errno
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from r1v3 import files


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_written_bytes_are_read_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.bin"
    files.write_bytes(target, b"\x00\r\n\xff")
    files.write_bytes(target, b"second\r\n")
    assert target.read_bytes() == b"second\r\n"
    assert names(target.parent) == ["a.bin"]


def test_text_is_utf8_and_newlines_are_not_translated(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "é\r\n等\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\n等\n".encode()


def test_new_files_obey_the_umask_and_not_a_private_mode(tmp_path: Path) -> None:
    """A colleague could not read the run folder if files kept mkstemp's mode 0600."""
    previous = os.umask(0o022)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    """The temporary name must not be longer than the file system allows."""
    target = tmp_path / ("等" * 85)
    files.write_text(target, "x")
    assert names(tmp_path) == [target.name]


def test_a_failed_write_keeps_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops a real write half way, as a full disk does."""
    target = tmp_path / "a.bin"
    files.write_bytes(target, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as failure:
            files.write_bytes(target, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert failure.value.errno == errno.EFBIG
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_directory_in_the_way_is_an_error_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        files.write_text(tmp_path / "a", "x")
    assert names(tmp_path) == ["a"]


def test_a_killed_writer_leaves_the_old_or_the_new_content(tmp_path: Path) -> None:
    """Writing in place would show a shorter file after kill -9 in the middle of a write."""
    target = tmp_path / "a.bin"
    program = textwrap.dedent(
        """
        import sys
        from r1v3.files import write_bytes
        number = 0
        while True:
            number = (number + 1) % 256
            write_bytes(sys.argv[1], bytes([number]) * 1_000_000)
            print(number, flush=True)
        """
    )
    for delay_lines in (1, 4, 9):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(target)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(files.__file__).parents[1],
        ) as process:
            assert process.stdout is not None
            for _ in range(delay_lines):
                process.stdout.readline()
            process.kill()
        content = target.read_bytes()
        assert len(content) == 1_000_000 and len(set(content)) == 1


def strict(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_numbers_without_a_form_become_null(tmp_path: Path) -> None:
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf, {"deep": (np.float32("nan"), 1.5)}],
        "numpy": [np.float32(0.5), np.int64(7)],
        "path": Path("a/b"),
        "flags": [True, None, 2],
    }
    files.write_json(tmp_path / "a.json", value)
    assert strict((tmp_path / "a.json").read_text()) == {
        "nan": None,
        "inf": [None, None, {"deep": [None, 1.5]}],
        "numpy": [0.5, 7],
        "path": "a/b",
        "flags": [True, None, 2],
    }


def test_json_keeps_readable_text_and_survives_a_lone_surrogate(tmp_path: Path) -> None:
    """Model text can hold half a surrogate pair, which plain UTF-8 writing dies of."""
    files.write_json(tmp_path / "a.json", "等 é")
    assert "等 é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    files.write_json(tmp_path / "b.json", {"text": "等 \ud83d"})
    assert strict((tmp_path / "b.json").read_text(encoding="utf-8")) == {"text": "等 \ud83d"}


def test_json_keeps_float_bits_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert strict(files.json_text([0.1 + 0.2, 5e-324, 2**70])) == [0.1 + 0.2, 5e-324, 2**70]
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": Decimal("1.5"), "b": object()})
    assert names(tmp_path) == []


def make_tree(directory: Path, text: str) -> Path:
    (directory / "inner").mkdir(parents=True)
    (directory / "a").write_text(text)
    (directory / "inner" / "b").write_text(text)
    return directory


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_replaces_another_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Both ways of replacing must work: the system call, and renaming where it is missing."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    final = tmp_path / "final"
    for text in ("one", "two"):
        files.replace_directory(make_tree(files.temporary_sibling(final), text), final)
        assert (final / "a").read_text() == (final / "inner" / "b").read_text() == text
    assert names(tmp_path) == ["final"]


def test_a_failed_replacement_keeps_the_directory_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    final = make_tree(tmp_path / "final", "one")
    new = make_tree(tmp_path / "new", "two")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source) == new:
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="broken disk"):
        files.replace_directory(new, final)
    assert (final / "a").read_text() == "one"
    assert names(tmp_path) == ["final", "new"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a Linux system call")
def test_a_reader_always_finds_the_directory_while_it_is_replaced(tmp_path: Path) -> None:
    """Two renames would leave an instant without it; a kill there would lose the checkpoint."""
    final = make_tree(tmp_path / "final", "start")
    missing: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if not os.path.exists(final / "a"):
                missing.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(60):
            files.replace_directory(make_tree(files.temporary_sibling(final), str(number)), final)
    finally:
        done.set()
        reader.join()
    assert not missing
    assert (final / "a").read_text() == "59"


def test_free_space_error_names_directory_needed_and_free(tmp_path: Path) -> None:
    files.require_free_space(tmp_path / "not" / "there", 1, "a byte")
    with pytest.raises(OSError, match=r"checkpoint of step 3: needs 1024\.0 TiB, .* are free") as e:
        files.require_free_space(tmp_path / "not" / "there", 2**50, "checkpoint of step 3")
    assert e.value.errno == errno.ENOSPC
    assert e.value.filename == str(tmp_path / "not" / "there")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_human_bytes(count: int, text: str) -> None:
    assert files.human_bytes(count) == text


def test_everything_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, a name that was durable before its content would show an empty file."""
    synced: set[int] = set()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def check(source: Path, target: Path) -> None:
        for path in [Path(source), *Path(source).rglob("*")]:
            assert path.stat().st_ino in synced, path

    def checked_rename(source: Path, target: Path) -> None:
        check(source, target)
        rename(source, target)

    def checked_replace(source: Path, target: Path) -> None:
        check(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", checked_rename)
    monkeypatch.setattr(os, "replace", checked_replace)
    files.write_text(tmp_path / "a", "x")
    assert synced == {(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino}
    synced.clear()
    files.replace_directory(make_tree(tmp_path / "new", "x"), tmp_path / "final")
    assert {(tmp_path / "final" / "inner" / "b").stat().st_ino, tmp_path.stat().st_ino} <= synced


def test_a_file_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    """Fails if the digest is not that of the bytes on disk, or an existing file is overwritten."""
    with files.HashedFile(tmp_path / "a") as file:
        assert [file.write(b"ab"), file.tell(), file.write(memoryview(b"c")), file.tell()] == [
            *(2, 2, 1, 3)
        ]
    assert (tmp_path / "a").read_bytes() == b"abc"
    assert file.digest == files.digest_of(tmp_path / "a") == (3, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(FileExistsError):
        files.HashedFile(tmp_path / "a")
