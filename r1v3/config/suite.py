"""The `suite` stage."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1v3.config.base import Positive, Section
from r1v3.config.sections import Decoding, Monitor, RolloutEngine
from r1v3.config.stages import Stage


class Judge(Section):
    """An OpenAI-compatible endpoint that is asked what rules cannot tell; off without a URL.

    api_key_file: holds the bearer token. concurrency: requests in flight at a time.
    """

    url: str | None = None
    model: str = "Qwen2.5-32B-Instruct"
    api_key_file: Path | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    retries: Annotated[int, Field(ge=0)] = 2
    concurrency: Positive = 16


class Suite(Stage):
    """Runs and scores public benchmarks.

    name: of the checkpoint, in tables and file names. data: folder of the benchmarks' files; null
    takes $LMUData, or ~/LMUData. benchmarks: keys in docs/suite.md; none named means all whose
    files are there. cuts: lengths in tokens at which answers of mode slow are cut and scored again,
    without asking again; their token ids are kept. samples: answers to each question and mode.
    protocol: `report` is rule or judge on the text after the last `</think>`; `kit` is VLMEvalKit's
    rules. allow_other_files: take files that are not the published ones. row_tiles: most tiles of
    all pictures of a row together, beside thumbnails; null takes max_tiles. compare: name of a
    checkpoint in the same run folder, to which gains are paired.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "checkpoint"
    data: Path | None = None
    benchmarks: tuple[str, ...] = ()
    modes: tuple[Literal["slow", "nothink", "nowait"], ...] = ("slow",)
    budgets: tuple[Positive, ...] = ()
    cuts: tuple[Positive, ...] = ()
    samples: Positive = 5
    protocol: Literal["report", "kit"] = "report"
    allow_other_files: bool = False
    row_tiles: Positive | None = None
    decoding: Decoding = Decoding(temperature=1.0, max_tokens=16384)
    rollout: RolloutEngine = RolloutEngine()
    batch_prompts: Positive = 64
    monitor: Monitor = Monitor()
    judge: Judge = Judge()
    compare: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Suite":
        if self.model is None:
            raise ValueError("`model` must name the folder of the checkpoint to score")
        if self.decoding.temperature == 0 and self.samples > 1:
            raise ValueError(
                "decoding.temperature 0 gives the same answer every time; set samples=1, or sample "
                "at the report's temperature of 1"
            )
        if not self.modes and not self.budgets:
            raise ValueError("`modes` and `budgets` name no way to answer")
        if self.cuts and "slow" not in self.modes:
            raise ValueError("`cuts` are of the answers of mode slow, which `modes` does not name")
        return self
