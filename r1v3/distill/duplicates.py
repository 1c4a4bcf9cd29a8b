"""Near-duplicate questions, and questions that stand in evaluation sets.

Two questions are the same if their texts are, nearly, with the same numbers in the same order, and
they show the same pixels: sums of other numbers are other questions, however alike. A question
without pictures is compared by its text alone, also with those that have some: a benchmark's text
may have been copied without its figure. Texts are compared by MinHash (datasketch, fixed seed).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1v3.config import Duplicates
from r1v3.data.images import load_image
from r1v3.data.schema import stream_samples
from r1v3.journal import Journal
from r1v3.suite.table import File, pictures, read_table

_PERMUTATIONS = 128
_SEED = 1
_SHINGLE = 5
# Shorter texts without pictures ("Solve.") say too little to be copies of one another.
_LEAST_CHARACTERS = 24


@dataclass(frozen=True)
class Shown:
    """The text of a question, and digests of its pictures' pixels, to compare."""

    text: str
    pixels: tuple[str, ...]


class Pixels:
    """Digests of decoded pictures, kept by their file's digest, so that each is decoded once.

    Attributes:
        unreadable: digests of files that cannot be decoded.
    """

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(folder, "pixels", {"pixels": "sha256 of RGB"})
        self._known: dict[str, str | None] = {}
        self._new: list[dict[str, str | None]] = []
        for _, _, fields in self._journal.read():
            self._known[fields["file"]] = fields["pixels"]

    def digests(self, images: Sequence[bytes], files: Sequence[str]) -> list[str | None]:
        """Digests of the pixels of pictures, None for those that cannot be decoded."""
        found = []
        for image, file in zip(images, files, strict=True):
            if file not in self._known:
                self._known[file] = _pixels(image)
                self._new.append({"file": file, "pixels": self._known[file]})
                if len(self._new) >= 256:
                    self.save()
            found.append(self._known[file])
        return found

    def save(self) -> None:
        """Append what is new."""
        self._journal.append(self._new)
        self._new = []


def _pixels(image: bytes) -> str | None:
    try:
        picture = load_image(image)
    except ValueError:
        return None
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32]


class Seen:
    """Questions to compare with, see the module's docstring.

    Args:
        similarity: of two texts, from which on they count as the same; None takes equal texts only.

    Raises:
        ImportError: datasketch is not installed; names the extra.
    """

    def __init__(self, similarity: float | None) -> None:
        self._similarity = similarity
        self._lsh = None if similarity is None else _new_index(similarity)
        self._hashes: dict[str, Any] = {}  # MinHash by text
        self._places: dict[str, list[tuple[str, tuple[str, ...]]]] = {}  # by text
        self._by_pixels: dict[tuple[str, ...], list[tuple[str, str]]] = {}

    def find(self, shown: Shown) -> str | None:
        """The name of a question that is the same, None where there is none."""
        text = plain(shown.text)
        if shown.pixels:
            for name, other in self._by_pixels.get(shown.pixels, ()):
                if self._same(text, other):
                    return name
        if len(text) < _LEAST_CHARACTERS:
            return None
        likely = [text] if self._lsh is None else sorted(self._lsh.query(self._hash(text)))
        for other in likely:
            if other in self._places and self._same(text, other):
                for name, pixels in self._places[other]:
                    if not (pixels and shown.pixels):
                        return name
        return None

    def _same(self, text: str, other: str) -> bool:
        if text == other:
            return True
        if self._similarity is None or _numbers(text) != _numbers(other):
            return False
        return bool(self._hash(text).jaccard(self._hash(other)) >= self._similarity)

    def add(self, name: str, shown: Shown) -> None:
        """Remember a question."""
        text = plain(shown.text)
        if shown.pixels:
            self._by_pixels.setdefault(shown.pixels, []).append((name, text))
        new = text not in self._places and len(text) >= _LEAST_CHARACTERS
        if new and self._lsh is not None:
            self._lsh.insert(text, self._hash(text))
        places = self._places.setdefault(text, [])
        # One of each kind is enough to be found.
        if not any(bool(pixels) == bool(shown.pixels) for _, pixels in places):
            places.append((name, shown.pixels))

    def _hash(self, text: str) -> Any:
        if text not in self._hashes:
            from datasketch import MinHash

            made = MinHash(num_perm=_PERMUTATIONS, seed=_SEED)
            made.update_batch([shingle.encode() for shingle in _shingles(text)])
            self._hashes[text] = made
        return self._hashes[text]


def plain(text: str) -> str:
    """A text in small letters without punctuation and placeholders, single spaces between words."""
    return " ".join(re.findall(r"\w+", text.replace("<image>", " ").lower()))


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _shingles(text: str) -> list[str]:
    return sorted({text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))})


def _new_index(similarity: float) -> Any:
    try:
        from datasketch import MinHashLSH
    except ImportError as error:
        raise ImportError(
            "finding near-duplicates needs datasketch: pip install 'r1v3[distill]', or set "
            "duplicates.similarity=null to compare equal texts only"
        ) from error
    return MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)


def evaluation_questions(path: Path) -> Iterator[tuple[str, str, list[bytes]]]:
    """Read the questions of an evaluation file: name, text and pictures of each.

    Raises:
        ValueError: it cannot be read; names the file.
    """
    if path.suffix == ".jsonl" or (path.suffix == ".parquet" and _has_prompts(path)):
        for sample in stream_samples(path):
            yield f"{path.name} {sample.index}", sample.question, list(sample.images)
        return
    table = read_table(path.parent, File(path.name))
    column = next((name for name in ("question", "problem") if name in table.columns), None)
    if column is None:
        raise ValueError(f"{path}: has no column `prompt` or `question`")
    for number, images in pictures(table, range(len(table.rows))):
        yield f"{path.name} {number}", table.rows[number][column], images


def _has_prompts(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return "prompt" in pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not a readable Parquet file: {error}") from error


def read_evaluation(config: Duplicates, pixels: Pixels) -> Seen:
    """The questions of all evaluation files, to compare with."""
    seen = Seen(config.similarity)
    for path in config.evaluation:
        for name, text, images in evaluation_questions(path):
            files = [hashlib.sha256(image).hexdigest() for image in images]
            found = tuple(digest for digest in pixels.digests(images, files) if digest)
            seen.add(name, Shown(text, found))
    pixels.save()
    return seen
