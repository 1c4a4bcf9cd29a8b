"""Writing files that are either complete or absent.

Everything is written under a temporary name in the directory of its destination, flushed and
fsynced, and then renamed over the destination: a reader, a crash or a full disk never sees half
a file. Standard library only, so that any part of the package can use it.
"""

import ctypes
import errno
import hashlib
import json
import math
import numbers
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

# Size in bytes and SHA-256 in hexadecimal.
FileDigest = tuple[int, str]


class HashedFile:
    """A new file that is hashed while it is written, from its first byte to its last.

    A context manager; leaving it without an error makes the file durable. `digest` is then its
    size and SHA-256.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; return how many."""
        self._hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand what is written to the system."""
        self._file.flush()

    @property
    def digest(self) -> FileDigest:
        """Size in bytes and SHA-256 of the closed file."""
        return self._size, self._hash.hexdigest()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                self._size = self._file.tell()
                os.fsync(self._file.fileno())


def digest_of(path: Path) -> FileDigest:
    """Read the size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically; missing parent directories are made.

    Raises:
        OSError: the write failed; `path` is as it was before and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically, newlines as they are; see `write_bytes`.

    Raises:
        UnicodeEncodeError: `text` holds a lone surrogate, which UTF-8 cannot carry.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Write `obj` as strict JSON (RFC 8259) to `path` atomically; see `json_text`."""
    write_text(path, json_text(obj, indent=indent) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: it holds something else; the message does not name the file.
        OSError: it cannot be read.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def json_text(obj: Any, *, indent: int | None = None) -> str:
    """`obj` as strict JSON that every parser reads and UTF-8 can carry.

    NaN and infinities become null, numpy scalars become numbers, paths become strings. Text is
    left readable unless it holds a lone surrogate (model output may); then it is escaped.

    Raises:
        TypeError: a value has no JSON form.
    """
    plain = _plain(obj)
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(plain, indent=indent, ensure_ascii=True, allow_nan=False)
    return text


def _plain(obj: Any) -> Any:
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, Mapping):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, numbers.Integral):
        return int(obj)
    if isinstance(obj, numbers.Real):
        number = float(obj)
        return number if math.isfinite(number) else None
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    return obj


def replace_directory(temporary: str | Path, final: str | Path) -> None:
    """Put the finished directory `temporary` in the place of `final`, on the same file system.

    Every file below `temporary` is fsynced first. An existing `final` is swapped in one step
    where the system can (Linux `renameat2`), else moved aside for an instant, and then deleted.

    Raises:
        OSError: the move failed; an existing `final` is back in its place.
    """
    temporary, final = Path(temporary), Path(final)
    _fsync_tree(temporary)
    if not final.exists():
        os.rename(temporary, final)
    elif _exchange(temporary, final):
        shutil.rmtree(temporary)
    else:
        aside = temporary_sibling(final)
        os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(aside, final)
            raise
        shutil.rmtree(aside)
    fsync_directory(final.parent)


def require_free_space(directory: str | Path, needed_bytes: int, what: str) -> None:
    """Check that `needed_bytes` can be written below `directory` (which need not exist yet).

    Args:
        what: what is about to be written, for the message, such as "checkpoint of step 40".
    Raises:
        OSError: ENOSPC, naming the directory, the bytes needed and the bytes free.
    """
    directory = Path(directory)
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough free space for {what}: needs {human_bytes(needed_bytes)}, "
            f"{human_bytes(free)} are free",
            str(directory),
        )


def human_bytes(count: int) -> str:
    """`count` in bytes for a person: 1536 gives "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove directories that a killed process left half written in `folder`."""
    for leftover in folder.glob(pattern):
        shutil.rmtree(leftover)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "4GiB", "500 MB" or "1048576" (GB is 10^9, GiB is 2^30).

    Raises:
        ValueError: it is no such size, or not positive.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?", text.strip(), re.IGNORECASE)
    if not matched:
        raise ValueError(f"{text!r} is no size; write it as 4GiB, 500MB or a number of bytes")
    number, prefix, binary = matched.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return size


def temporary_sibling(path: str | Path) -> Path:
    """An unused hidden name `.<name>.<random>.tmp` in the directory of `path`."""
    path = Path(path)
    return path.with_name(f".{path.name[:48]}.{secrets.token_hex(6)}.tmp")


def fsync_directory(directory: str | Path) -> None:
    """Make the names in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; their renames are durable already.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one system call; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
