"""An account of a file of rows, as stages will read it, and of its wrong rows."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import PreTrainedTokenizerFast

from r1v3.config import Pictures
from r1v3.data.encoding import encode_prompt, encode_response
from r1v3.data.images import TruncatedImage, open_image
from r1v3.data.lengths import PositionLimit
from r1v3.data.pixels import orientation_of
from r1v3.data.sample import OPTIONAL_KEYS, Sample
from r1v3.data.schema import read_samples
from r1v3.data.tiles import ImageShape, decode_picture


@dataclass(frozen=True)
class ModelLimits:
    """The tokenizer that counts the tokens of a row, and the positions of its model."""

    tokenizer: PreTrainedTokenizerFast
    limit: PositionLimit


@dataclass
class FileCheck:
    """The account of a file.

    Attributes:
        rows: in the file, wrong ones included.
        first: the first right row and its place.
        columns, extra_keys: further columns and further keys of `extra_info`, with their rows.
        values: by name of a field, how many rows have each value.
        formats: pictures by format and PIL mode.
        notes: pictures by what is done to them.
        sizes: (width, height) of every whole picture, upright.
        tiles: of every whole picture, its thumbnail included.
        most_pictures: in one row.
        prompt_tokens, response_tokens: with the place of their row.
        ignored: rows by what is not used of them, in words.
        problems: place and reason of every wrong row.
        left_out: rows that a stage leaves out, because a picture is truncated.
    """

    rows: int = 0
    first: tuple[str, Sample] | None = None
    columns: Counter[str] = field(default_factory=Counter)
    extra_keys: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[str]] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    most_pictures: int = 0
    prompt_tokens: list[tuple[int, str]] = field(default_factory=list)
    response_tokens: list[tuple[int, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)
    left_out: int = 0


def check_file(path: Path, shape: ImageShape, model: ModelLimits | None = None) -> FileCheck:
    """Read a file row by row, decode every picture, and count.

    Args:
        shape: the tiling, and what becomes of truncated pictures.
        model: also counts tokens.

    Raises:
        ValueError: the file cannot be read at all.
    """
    check = FileCheck()
    for place, found in read_samples(path, check.ignored):
        check.rows += 1
        if isinstance(found, str):
            check.problems.append((place, found))
            continue
        if check.first is None:
            check.first = place, found
        _count_fields(check, found)
        try:
            counts = _count_pictures(check, found, shape)
            if model is not None:
                _count_tokens(check, place, found, counts, model)
        except TruncatedImage as error:
            if shape.pictures.truncated == "skip":
                check.left_out += 1
            else:
                check.problems.append((place, str(error)))
        except ValueError as error:
            check.problems.append((place, str(error)))
    if not check.rows:
        check.problems.append(("file", "it holds no rows"))
    return check


def _count_fields(check: FileCheck, sample: Sample) -> None:
    check.columns.update(sample.columns)
    known = ("split", "index", *OPTIONAL_KEYS)
    check.extra_keys.update(key for key in sample.extra_info if key not in known)
    for name, value in {
        "data_source": sample.data_source,
        "split": sample.split,
        "domain": sample.domain,
        "ability": sample.ability,
    }.items():
        if value is not None:
            check.values.setdefault(name, Counter())[value] += 1
    has = check.values.setdefault("has", Counter())
    has["options"] += sample.options is not None
    has["response"] += bool(sample.response)
    has["images"] += bool(sample.images)


def _count_pictures(check: FileCheck, sample: Sample, shape: ImageShape) -> list[int]:
    """Count the pictures of a row; return the image tokens of each."""
    check.most_pictures = max(check.most_pictures, len(sample.images))
    counts = []
    for index, data in enumerate(sample.images):
        name = f"images[{index}]"
        try:
            with open_image(data, name) as image:
                check.formats[f"{image.format} {image.mode}"] += 1
                _note(check, image)
            picture = _decode(check, data, shape.pictures)
        except TruncatedImage as error:
            raise TruncatedImage(f"{name} is truncated: it ends before its last pixel") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        check.sizes.append(picture.size)
        tiles = shape.count(*picture.size)
        check.tiles.append(tiles)
        counts.append(tiles * shape.tokens_per_tile)
    return counts


def _decode(check: FileCheck, data: bytes, pictures: Pictures) -> Image.Image:
    try:
        return decode_picture(data, pictures.model_copy(update={"truncated": "error"}))
    except TruncatedImage:
        check.notes["truncated"] += 1
        return decode_picture(data, pictures)


def _note(check: FileCheck, image: Image.Image) -> None:
    """Count what is done to a picture."""
    if image.has_transparency_data:
        check.notes["transparent"] += 1
    if image.mode == "F" or image.mode.startswith("I"):
        check.notes["of more than 8 bits"] += 1
    if orientation_of(image) in range(2, 9):
        check.notes["turned"] += 1
    if _frames(image) > 1:
        check.notes["of several frames"] += 1


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # damage in later frames, which nothing reads: many types
        return 1


def _count_tokens(
    check: FileCheck, place: str, sample: Sample, counts: list[int], model: ModelLimits
) -> None:
    thinking = sample.thinking
    prompt = len(encode_prompt(sample, model.tokenizer, counts, thinking=thinking))
    response = len(encode_response(sample, model.tokenizer, thinking=thinking))
    check.prompt_tokens.append((prompt, place))
    if response:
        check.response_tokens.append((response, place))
    if told := model.limit.excess(prompt, response):
        raise ValueError(f"{told}; the model has {model.limit.positions} positions")
