"""The settings of `r1v3 serve`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from r1v3.config.base import Positive, Section
from r1v3.config.sections import DEFAULT_PICTURES, Monitor, Pictures


class Serve(Section):
    """An OpenAI-compatible endpoint over a model in this process.

    name: of the model, for clients; null takes the folder's. port: 0 takes any free one.
    api_key_file: holds the bearer key that clients must send. rows: completions that are decoded
    together. queue: requests that may wait for a row. max_body_mb: of a request, in 10^6 bytes.
    max_picture_megapixels: of a picture before it is cut into tiles. max_tiles: most tiles of a
    picture, by default the model's own number. row_tiles: most tiles of all pictures of a request
    together, beside thumbnails; null takes max_tiles. unfinished: the content of an answer whose
    thought never ended, which some clients ask again if it is empty. drain_seconds: how long
    requests may go on after SIGTERM.
    """

    model: Path
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key_file: Path | None = None
    rows: Positive = 16
    queue: Annotated[int, Field(ge=0)] = 64
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0
    max_picture_megapixels: Annotated[float, Field(gt=0)] = 25.0
    max_tiles: Positive | None = None
    row_tiles: Positive | None = None
    pictures: Pictures = DEFAULT_PICTURES
    monitor: Monitor = Monitor()
    unfinished: str = "…"
    drain_seconds: Annotated[int, Field(ge=0)] = 600
    threads: Positive | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
