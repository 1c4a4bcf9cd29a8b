"""`r1v3 plan`: reads a stage's configuration, plans it, prints it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from transformers import InternVLConfig

from r1v3.config import GRPO, SFT, Connector, Evaluate, Stage, load
from r1v3.data.encoding import model_image_shape
from r1v3.files import write_json
from r1v3.model.flops import Dimensions
from r1v3.plan.build import build_ranks
from r1v3.plan.job import Cluster, job_of, model_folder
from r1v3.plan.plan import make_plan
from r1v3.plan.printing import as_json, print_plan
from r1v3.plan.search import on_more_gpus, propose

STAGES: dict[str, type[Stage]] = {
    "sft": SFT,
    "grpo": GRPO,
    "connector": Connector,
    "eval": Evaluate,
}


def stage_kind(config_file: Path, stage: str | None) -> type[Stage]:
    """The class of a configuration, named by `stage` or by its file: grpo_4k.yaml is a grpo.

    Raises:
        ValueError: neither names a stage.
    """
    name = stage or config_file.stem.split("_")[0]
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is not one of {', '.join(STAGES)}; give --stage")
    return STAGES[name]


def stored_parameters(folder: Path) -> int | None:
    """Parameters in the weight files of a model folder, from their headers; None without any."""
    total, files = 0, sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            total += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())
    return total if files else None


def run_plan(
    config_file: Path,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    stage: str | None = None,
    sequence_length: int | None = None,
    text_tokens: int,
    json_file: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Plan a stage with parameters counted in the real modules; True if it fits.

    Raises:
        ValueError: the configuration, the layout or the model cannot be used, or the weight files
            hold another number of parameters than the model has.
    """
    kind = stage_kind(config_file, stage)

    folder = model_folder(load(kind, config_file, overrides), config_file)
    model = InternVLConfig.from_pretrained(folder)
    own_tiles = model_image_shape(model).max_tiles

    def loader(changes: Sequence[str]) -> Stage:
        config = load(kind, config_file, [*overrides, *changes])
        return config.model_copy(update={"max_tiles": config.max_tiles or own_tiles})

    config = loader(())
    dims = Dimensions.of(model)
    job = job_of(config, dims, cluster, sequence_length=sequence_length, text_tokens=text_tokens)
    plan = make_plan(job, dims, build_ranks(folder, job.layout))
    stored, counted = stored_parameters(folder), sum(plan.parameters.values())
    if stored not in (None, counted):
        raise ValueError(
            f"the weight files in {folder} hold {stored:,} parameters, the model of its "
            f"config.json has {counted:,}"
        )
    proposals, larger = [], None
    lengths: dict[str, Any] = {"sequence_length": sequence_length, "text_tokens": text_tokens}
    if not plan.fits:
        proposals = propose(loader, dims, cluster, **lengths)
        larger = None if proposals else on_more_gpus(loader, dims, cluster, **lengths)
    print_plan(plan, config_file.stem, proposals, larger, console or Console())
    if json_file is not None:
        write_json(json_file, as_json(plan, proposals))
    return plan.fits
