r"""Samples: one question with its images, ground truth and, for SFT, a response.

The layout is the one verl's multimodal datasets use, so a Parquet file written here trains there:

    {"data_source": str,
     "prompt": [{"role": str, "content": "<image>..."}],
     "images": [{"bytes": ...}],
     "ability": str,
     "reward_model": {"style": "rule", "ground_truth": str},
     "extra_info": {"split": str, "index": int, "domain", "options", "question", "answer",
                    "response", ...}}

Files are not trusted: every row is checked before any is returned.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetPydanticSchema,
    StrictBytes,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

from r1v3.data.images import MAX_FILE_BYTES, check_image_header
from r1v3.rewards.choices import option_texts

IMAGE_PLACEHOLDER = "<image>"
OPTIONAL_KEYS = ("domain", "options", "question", "answer", "response")


def _as_list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list, not {type(value).__name__}")
    return list(value)


@with_config(ConfigDict(extra="forbid"))
class Message(TypedDict):
    """One turn of a prompt; `content` holds one `<image>` per image shown in it."""

    role: Literal["system", "user", "assistant"]
    content: StrictStr


@with_config(ConfigDict(extra="forbid"))
class RewardModel(TypedDict):
    """Grading of a completion: by rule, against `ground_truth`."""

    style: Literal["rule"]
    ground_truth: StrictStr


@with_config(ConfigDict(extra="allow"))
class _ExtraInfo(TypedDict):
    split: StrictStr
    index: StrictInt
    domain: NotRequired[StrictStr | None]
    options: NotRequired[Annotated[list[StrictStr], BeforeValidator(_as_list)] | None]
    question: NotRequired[StrictStr | None]
    answer: NotRequired[StrictStr | None]
    response: NotRequired[StrictStr | None]


def _complete(extra_info: dict[str, Any]) -> dict[str, Any]:
    """All known keys, then those further keys that have a value, which JSON must be able to hold.

    A further key with the value None is dropped: Parquet cannot tell it from an absent one.
    """
    if not -(2**63) <= extra_info["index"] < 2**63:
        raise ValueError("index does not fit 64 bits")
    known = ("split", "index", *OPTIONAL_KEYS)
    further = {k: v for k, v in extra_info.items() if k not in known and v is not None}
    try:
        json.dumps(further, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"further keys must hold JSON values: {error}") from error
    return {**{key: extra_info.get(key) for key in known}, **further}


class Sample(BaseModel):
    """One checked sample, in verl's layout (module docstring). Two are equal if all content is.

    `images` are the encoded bytes of image files. `extra_info` has all the known keys, None where
    not given; further keys are kept if JSON can hold their values.

    Raises (on construction): pydantic's ValidationError, a ValueError, if a field is missing, of a
    wrong type or unknown, if an image has no readable header, or if the number of `<image>`
    placeholders in the prompt is not the number of images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    data_source: StrictStr
    prompt: Annotated[list[Message], BeforeValidator(_as_list)]
    images: Annotated[list[StrictBytes], BeforeValidator(_as_list)] = []
    ability: StrictStr
    reward_model: RewardModel
    extra_info: Annotated[
        dict[str, Any],
        AfterValidator(_complete),
        GetPydanticSchema(lambda _, handler: handler(_ExtraInfo)),
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(message["role"] == "user" for message in self.prompt):
            raise ValueError("prompt has no message with role 'user'")
        for index, image in enumerate(self.images):
            check_image_header(image, f"images[{index}]")
        placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in self.prompt)
        if placeholders != len(self.images):
            raise ValueError(
                f"prompt has {placeholders} {IMAGE_PLACEHOLDER} placeholders and images has "
                f"{len(self.images)} entries; they must be as many"
            )
        try:
            json.dumps({**self.to_row(), "images": []}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:  # a lone surrogate: JSON can spell it, UTF-8 cannot
            raise ValueError("a text is not valid Unicode") from error
        return self

    @property
    def question(self) -> str:
        """The question alone; without one in `extra_info`, the last user turn less placeholders."""
        question: str | None = self.extra_info["question"]
        if question is not None:
            return question
        turns = [message["content"] for message in self.prompt if message["role"] == "user"]
        return turns[-1].replace(IMAGE_PLACEHOLDER, "").strip()

    @property
    def ground_truth(self) -> str:
        """The right answer, with which a completion's final answer is compared."""
        return self.reward_model["ground_truth"]

    @property
    def options(self) -> list[str] | None:
        """Texts of the options A, B, ..., or None for an open question."""
        options: list[str] | None = self.extra_info["options"]
        return options

    @property
    def domain(self) -> str | None:
        """Subject, such as "geometry"."""
        domain: str | None = self.extra_info["domain"]
        return domain

    @property
    def split(self) -> str:
        """The part of the data that it belongs to, such as "train"."""
        return str(self.extra_info["split"])

    @property
    def index(self) -> int:
        """Number of the sample within its split."""
        return int(self.extra_info["index"])

    @property
    def response(self) -> str | None:
        """Target completion of supervised training, if the sample has one."""
        response: str | None = self.extra_info["response"]
        return response

    def to_row(self) -> dict[str, Any]:
        """The sample as plain lists and dicts in verl's layout; images as `{"bytes": bytes}`."""
        return {
            "data_source": self.data_source,
            "prompt": [dict(message) for message in self.prompt],
            "images": [{"bytes": image} for image in self.images],
            "ability": self.ability,
            "reward_model": dict(self.reward_model),
            "extra_info": dict(self.extra_info),
        }


def make_sample(
    *,
    question: str,
    ground_truth: str,
    data_source: str,
    index: int,
    images: Sequence[bytes] = (),
    system: str | None = None,
    options: Sequence[str] | None = None,
    response: str | None = None,
    ability: str = "math",
    **further: Any,
) -> Sample:
    r"""Make a sample from its parts.

    A question without `<image>` gets one per image in front (`<image>\n`, as InternVL does), and
    options are listed below it as `A. ...`, once if they carry their letters. Further keywords go
    into `extra_info`, such as `domain`, `split` ("train" by default) or `answer` (`ground_truth` by
    default).

    Raises:
        ValueError: as `Sample`.
    """
    shown = question
    if IMAGE_PLACEHOLDER not in question:
        shown = f"{IMAGE_PLACEHOLDER}\n" * len(images) + question
    if options is not None:
        texts = option_texts(options)
        lines = [f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(texts)]
        shown = "\n".join([shown, "Options:", *lines])
    prompt = [] if system is None else [{"role": "system", "content": system}]
    prompt.append({"role": "user", "content": shown})
    extra_info = {
        "split": "train",
        "index": index,
        "options": None if options is None else list(options),
        "question": question.replace(IMAGE_PLACEHOLDER, "").strip(),
        "answer": ground_truth,
        "response": response,
        **further,
    }
    return Sample.model_validate(
        {
            "data_source": data_source,
            "prompt": prompt,
            "images": list(images),
            "ability": ability,
            "reward_model": {"style": "rule", "ground_truth": ground_truth},
            "extra_info": extra_info,
        }
    )


def parse_row(row: Any, *, folder: Path) -> Sample:
    """Sample from one decoded row of a file.

    An image may be bytes, `{"bytes": bytes or base64 text}`, a `data:...;base64,` address, a path,
    or `{"path": path}`. Paths are relative to `folder` and must stay inside it.

    Raises:
        ValueError: the row is wrong; every fault is named with its key.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, not {type(row).__name__}")
    images = row.get("images")
    if images is None:
        images = []
    if not isinstance(images, list | tuple):
        raise ValueError(f"images: must be a list, not {type(images).__name__}")
    faults: list[str] = []
    contents: list[bytes] = []
    for index, image in enumerate(images):
        try:
            contents.append(_image_bytes(image, folder))
        except ValueError as error:
            faults.append(f"images[{index}]: {error}")
    if faults:
        raise ValueError("; ".join(faults))
    try:
        return Sample.model_validate({**row, "images": contents})
    except ValidationError as error:
        raise ValueError("; ".join(_fault(fault) for fault in error.errors())) from None


def _fault(fault: Any) -> str:
    """`key: reason` of one pydantic error, without echoing the (possibly huge) value."""
    message = fault["msg"].removeprefix("Value error, ")
    key = ""
    for part in fault["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    if fault["type"] == "extra_forbidden":
        message = "unknown key; put further information into extra_info"
    return f"{key}: {message}" if key else message


def _image_bytes(image: Any, folder: Path) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, dict):
        content, path = image.get("bytes"), image.get("path")
        if isinstance(content, bytes):
            return content
        if isinstance(content, str):
            return _from_base64(content)
        if content is None and isinstance(path, str):
            return _read_inside(folder, path)
        raise ValueError('an object must hold "bytes" (bytes or base64 text) or "path" (text)')
    if isinstance(image, str):
        if image.startswith("data:"):
            return _from_base64(image.partition(";base64,")[2])
        return _read_inside(folder, image)
    raise ValueError(f"must be bytes, a path or an object, not {type(image).__name__}")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
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
