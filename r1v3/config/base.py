"""The base of every configuration section."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, value and remedy."""


class Section(BaseModel):
    """A mapping of known keys; anything else is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
