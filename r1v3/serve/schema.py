"""The JSON of a chat completion request.

Keys that mean nothing here are ignored; null is the same as an absent key. Types are strict: the
text "1" is not a number.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from r1v3.serve.errors import Refusal

_Long = Annotated[str, Field(max_length=256, min_length=1)]
Value = TypeVar("Value")


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Body):
    """Text."""

    type: Literal["text"]
    text: str


class Address(_Body):
    """Where a picture is."""

    url: str


class PicturePart(_Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: Address | str

    @property
    def url(self) -> str:
        """The address of the picture."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part = Annotated[TextPart | PicturePart, Field(discriminator="type")]


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(_Body):
    """Settings of a stream."""

    include_usage: bool | None = None


class TemplateOptions(_Body):
    """`chat_template_kwargs`: the mode."""

    enable_thinking: bool | None = None
    mode: str | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None


class ResponseFormat(_Body):
    """The form of an answer; there is one."""

    type: Literal["text"]


class ChatRequest(_Body):
    """A request for chat completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: _Long | Annotated[list[_Long], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    return_token_ids: bool | None = None
    mode: str | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    response_format: ResponseFormat | None = None
    # What other servers have and this one has not, where it would change the answer.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def read_request(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        Refusal: it is no JSON object, or a key has a wrong type or value; names the key.
    """
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}"[:300]) from error
    if not isinstance(found, dict):
        raise Refusal(400, f"the body must be a JSON object, not {type(found).__name__}")
    try:
        return ChatRequest.model_validate(found)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = _location(problem["loc"], found)
        raise Refusal(400, f"{where}: {problem['msg']}", param=where) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _location(location: tuple[int | str, ...], found: object) -> str:
    """The path of a key as in `messages[0].content`, without pydantic's names of alternatives."""
    path = ""
    for part in location:
        try:
            found = found[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            if part != location[-1] or not isinstance(found, dict):
                continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200] or "body"
