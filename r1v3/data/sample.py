r"""Samples: one question with its images, ground truth and, for SFT, a response.

The layout is the one verl's multimodal datasets use, so a Parquet file written here trains there:

    {"data_source": str,
     "prompt": [{"role": str, "content": "<image>..."}],
     "images": [{"bytes": ...}],
     "ability": str,
     "reward_model": {"style": "rule", "ground_truth": str},
     "extra_info": {"split": str, "index": int | str, "domain", "options", "question", "answer",
                    "response", ...},
     ...}

Further columns are kept. Files are not trusted: `r1v3.data.rows` checks what they hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetPydanticSchema,
    StrictBytes,
    StrictStr,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

from r1v3.data.images import check_image_header
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


def _number_as_text(value: Any) -> Any:
    """`3` and `3.0` as "3", `0.5` as "0.5"; what is no number as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return str(value)
    return repr(value) if isinstance(value, float) and math.isfinite(value) else value


def _index(value: Any) -> int | str:
    if isinstance(value, float) and value.is_integer():  # pandas, where other rows have none
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("Input should be a valid integer or text")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("does not fit 64 bits")
    return value


@with_config(ConfigDict(extra="allow"))
class RewardModel(TypedDict):
    """Grading of a completion against `ground_truth`, by rule whatever the style; a number as
    ground truth becomes text."""

    style: Annotated[StrictStr, BeforeValidator(lambda style: "rule" if style is None else style)]
    ground_truth: Annotated[StrictStr, BeforeValidator(_number_as_text)]


@with_config(ConfigDict(extra="allow"))
class _ExtraInfo(TypedDict):
    split: NotRequired[StrictStr | None]
    index: Annotated[int | str, BeforeValidator(_index)]
    domain: NotRequired[StrictStr | None]
    options: NotRequired[Annotated[list[StrictStr], BeforeValidator(_as_list)] | None]
    question: NotRequired[StrictStr | None]
    answer: NotRequired[Annotated[StrictStr | None, BeforeValidator(_number_as_text)]]
    response: NotRequired[StrictStr | None]


def _with_value(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that have a value, which JSON must be able to hold.

    A key with the value None is dropped: Parquet cannot tell it from an absent one.
    """
    kept = {key: value for key, value in values.items() if value is not None}
    try:
        json.dumps(kept, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"further keys must hold JSON values: {error}") from error
    return kept


def _complete(extra_info: dict[str, Any]) -> dict[str, Any]:
    """All known keys, then those further keys that have a value."""
    known = ("split", "index", *OPTIONAL_KEYS)
    further = _with_value({k: v for k, v in extra_info.items() if k not in known})
    return {**{key: extra_info.get(key) for key in known}, **further}


class Sample(BaseModel):
    """One checked sample, in verl's layout (module docstring). Two are equal if all content is.

    `images` are the encoded bytes of image files. `extra_info` has all the known keys, None where
    not given; further keys are kept if JSON can hold their values, and so are further `columns`.

    Raises (on construction): pydantic's ValidationError, a ValueError, if a field is missing, of a
    wrong type or unknown, if an image has no readable header, or if the number of `<image>`
    placeholders in the prompt is not the number of images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    data_source: StrictStr
    prompt: Annotated[list[Message], BeforeValidator(_as_list)]
    images: Annotated[list[StrictBytes], BeforeValidator(_as_list)] = []
    ability: StrictStr | None
    reward_model: Annotated[RewardModel, AfterValidator(_with_value)]
    extra_info: Annotated[
        dict[str, Any],
        AfterValidator(_complete),
        GetPydanticSchema(lambda _, handler: handler(_ExtraInfo)),
    ]
    columns: Annotated[dict[str, Any], AfterValidator(_with_value)] = {}

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
    def split(self) -> str | None:
        """The part of the data that it belongs to, such as "train"."""
        split: str | None = self.extra_info["split"]
        return split

    @property
    def thinking(self) -> bool:
        """Whether its response was written for the template that opens a thought."""
        return bool(self.extra_info.get("thinking", True))

    @property
    def index(self) -> int | str:
        """Number or name of the sample within its split."""
        index: int | str = self.extra_info["index"]
        return index

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
            **self.columns,
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
