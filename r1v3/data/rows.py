"""Rows of files as samples: verl's layout as people have it.

Files are not trusted: every row is checked. What is not used of a row is counted, to be said once.
"""

import base64
import binascii
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from r1v3.data.images import MAX_FILE_BYTES
from r1v3.data.sample import OPTIONAL_KEYS, Sample

USED_COLUMNS = (
    "data_source",
    "prompt",
    "images",
    "ability",
    "reward_model",
    "extra_info",
)
_INDEX_COLUMN = re.compile(r"__index_level_\d+__")
_JSON_TYPES = (str, int, float, bool)
# What a sample checks itself.
_CHECKED_KEYS = {
    "extra_info": ("split", "index", *OPTIONAL_KEYS),
    "reward_model": ("style", "ground_truth"),
}


def parse_row(row: Any, *, folder: Path, ignored: Counter[str] | None = None) -> Sample:
    """Sample from one decoded row of a file.

    - An image may be bytes, `{"bytes": bytes or base64 text}`, a `data:...;base64,` address, or a
      path, with `file://` in front or not; `{"path": ...}` and `{"image": ...}` hold one of the
      last two. Paths are relative to `folder` and must stay inside it. A row may hold one image
      instead of a list. None, and an object that holds nothing else, is no image.
    - Columns, and keys of `extra_info` and `reward_model`, that a sample does not know are kept if
      JSON can hold their values.
    - NaN, which pandas writes where there is no value, counts as none.

    Args:
        ignored: counts what is not used of the row, in words.

    Raises:
        ValueError: the row is wrong; every fault is named with its key.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, not {type(row).__name__}")
    unused: Counter[str] = Counter() if ignored is None else ignored
    contents = _images(row.get("images"), folder)
    used = {key: row[key] for key in USED_COLUMNS if key in row and key != "images"}
    for key in ("extra_info", "reward_model"):
        if key in used:
            used[key] = _json_keys(key, _without_nan(used[key]), unused)
    if isinstance(used.get("prompt"), list):
        used["prompt"] = [_without_empty(message) for message in used["prompt"]]
    if isinstance(ability := used.get("ability"), float) and math.isnan(ability):
        used["ability"] = None
    columns = _further_columns(row, unused)
    try:
        sample = Sample.model_validate({**used, "images": contents, "columns": columns})
    except ValidationError as error:
        raise ValueError("; ".join(_fault(fault) for fault in error.errors())) from None
    style = sample.reward_model["style"]
    if style != "rule":
        unused[f"reward_model.style {style!r:.60} (answers are graded by rule)"] += 1
    return sample


def _further_columns(row: dict[str, Any], unused: Counter[str]) -> dict[str, Any]:
    kept = {}
    for key, value in row.items():
        if key in USED_COLUMNS:
            continue
        if _INDEX_COLUMN.fullmatch(key):
            unused[f"column {key} (the index of a pandas table)"] += 1
            continue
        clean = _without_nan(value)
        if clean is None or _is_json(clean):
            kept[key] = clean
        else:
            unused[f"column {key} ({type(value).__name__} values, which JSON cannot hold)"] += 1
    return kept


def _json_keys(column: str, value: Any, unused: Counter[str]) -> Any:
    """An object without the further keys whose values JSON cannot hold."""
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if key in _CHECKED_KEYS[column] or _is_json(item):
            kept[key] = item
        else:
            what = f"{column}.{key} ({type(item).__name__} values, which JSON cannot hold)"
            unused[what] += 1
    return kept


def _without_nan(value: Any) -> Any:
    """The same with None in place of every NaN, and lists in place of tuples (a map's entries)."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def _without_empty(message: Any) -> Any:
    """A message without the keys that only other messages have: Parquet fills them in as null."""
    if not isinstance(message, dict):
        return message
    return {
        key: value
        for key, value in message.items()
        if value is not None or key in ("role", "content")
    }


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or (isinstance(value, _JSON_TYPES) and value not in (math.inf, -math.inf))


def _images(images: Any, folder: Path) -> list[bytes]:
    if images is None or (isinstance(images, float) and math.isnan(images)):
        return []
    if isinstance(images, bytes | str | dict):
        images = [images]
    if not isinstance(images, list | tuple):
        raise ValueError(f"images: must be a list, not {type(images).__name__}")
    faults: list[str] = []
    contents: list[bytes] = []
    for index, image in enumerate(images):
        if image is None or (
            isinstance(image, dict) and image and all(part is None for part in image.values())
        ):
            continue
        try:
            contents.append(image_bytes(image, folder))
        except ValueError as error:
            faults.append(f"images[{index}]: {error}")
    if faults:
        raise ValueError("; ".join(faults))
    return contents


def _fault(fault: Any) -> str:
    """`key: reason` of one pydantic error, without echoing the (possibly huge) value."""
    message = fault["msg"].removeprefix("Value error, ")
    key = ""
    for part in fault["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    if fault["type"] == "extra_forbidden":
        message = "unknown key; a message has a role and a content"
    return f"{key}: {message}" if key else message


def image_bytes(image: Any, folder: Path) -> bytes:
    """The encoded picture that a value of `images` stands for; see `parse_row`.

    Raises:
        ValueError: it stands for none.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, dict):
        content = image.get("bytes")
        if isinstance(content, bytes):
            return content
        if isinstance(content, str):
            return _from_base64(content)
        place = image.get("path") if image.get("path") is not None else image.get("image")
        if content is None and isinstance(place, str):
            return _from_place(place, folder)
        raise ValueError(
            'an object must hold "bytes" (bytes or base64 text), or "path" or "image" (text)'
        )
    if isinstance(image, str):
        return _from_place(image, folder)
    raise ValueError(f"must be bytes, a path or an object, not {type(image).__name__}")


def _from_place(place: str, folder: Path) -> bytes:
    """The bytes in a `data:` address, or in the file at a path."""
    if place.startswith("data:"):
        return _from_base64(place)
    if place.startswith("file://"):
        return _read_inside(folder, unquote(place.removeprefix("file://")))
    return _read_inside(folder, place)


def _from_base64(text: str) -> bytes:
    """Decode base64, of a `data:` address or alone; many programs break it into lines."""
    if text.startswith("data:"):
        text = text.partition(";base64,")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"is not base64: {error}") from error


def _read_inside(folder: Path, path: str) -> bytes:
    shown = path if len(path) <= 200 else path[:200] + "..."
    root = folder.resolve()
    try:
        target = (root / path).resolve()
        inside = target.is_relative_to(root)
        if inside and target.is_file():
            if target.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"path {shown!r} has more than {MAX_FILE_BYTES} bytes")
            return target.read_bytes()
    except OSError as error:  # too long a name, no permission
        raise ValueError(f"path {shown!r} cannot be read: {error.strerror}") from error
    except RuntimeError as error:
        raise ValueError(f"path {shown!r} is a loop of links") from error
    if not inside:
        raise ValueError(f"path {shown!r} leads out of the data file's folder")
    raise ValueError(f"path {shown!r} is not a file in the data file's folder")
