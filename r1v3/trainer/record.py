"""The record of a stage: its start, with which alone `--resume` goes on, and its length.

`<run>/config/<stage>.yaml` holds the settings; `<run>/config/<stage>.record.json` holds digests of
the data and of the model that the stage starts from, and the `steps` or `epochs` that the published
model was trained for.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from r1v3.config import GRPO, Stage, Supervised
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.files import json_text, read_json_object, write_json

# Settings with which a run learns the same: where it runs, how the work is split, when it is saved.
# Paths are among them, because what lies there is compared. `too_long` cannot change what is kept
# of the same data.
FREE = (
    "run",
    "processes",
    "threads",
    "device",
    "parallel",
    "wandb_project",
    "model",
    "train_data",
    "validation_data",
    "architecture.tokenizer_data",
    "too_long",
    "curriculum.pass_rates",
    "micro_batch_size",
    "micro_batch_prompts",
    "micro_batch_tokens",
    "checkpoint_every",
    "keep",
    "keep_models",
    "profile",
    "dump_rollouts_every",
    "optimizer.max_skipped",
    "rewards.verifier_timeout_seconds",
    "rewards.verifier_retries",
    "rollout.urls",
    "rollout.tensor",
    "rollout.memory_share",
    "rollout.timeout_seconds",
    "rollout.retries",
    "rollout.concurrency",
    "rollout.weights_folder",
    "rollout.trust_remote_code",
    "rollout.vllm",
)
# The length of a stage, which may grow.
LENGTHS = ("steps", "epochs")
_WHOLE_FILE = 64 << 20
_PIECES, _PIECE = 256, 64 << 10


class NothingToDo(Exception):
    """A stage that is to go on is finished; the message says so."""


def digests(config: Stage, data: Mapping[str, Sequence[Sample]]) -> dict[str, str]:
    """Return what a stage learns from, by the setting that names it.

    Args:
        data: the samples of `train_data`, `validation_data` and the files of a curriculum.
    """
    found = {key: data_digest(samples) for key, samples in data.items()}
    if config.model is not None:
        found["model"] = folder_digest(config.model)
    if isinstance(config, GRPO) and (rates := config.curriculum.pass_rates) is not None:
        content = hashlib.sha256(rates.read_bytes())
        found["curriculum.pass_rates"] = f"sha256 {content.hexdigest()[:16]}"
    if isinstance(config, Supervised) and config.architecture is not None:
        for i, file in enumerate(config.architecture.tokenizer_data):
            found[f"architecture.tokenizer_data[{i}]"] = data_digest(load_samples(file))
    return found


def data_digest(samples: Sequence[Sample]) -> str:
    """Return the number and a hash of samples: of texts, pictures and their order, not of the file
    format."""
    total = hashlib.sha256()
    for sample in samples:
        row = sample.to_row()
        row["images"] = [hashlib.sha256(image).hexdigest() for image in sample.images]
        total.update(json_text(row).encode() + b"\n")
    return f"{len(samples)} rows, sha256 {total.hexdigest()[:16]}"


def folder_digest(folder: Path) -> str:
    """Return a hash of a model folder: of names, sizes and contents.

    Of a file above 64 MiB, 256 evenly spaced pieces of 64 KiB are read: weights that were trained
    differ in some of them.
    """
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".safetensors", ".txt", ".jinja", ".model"):
            continue
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE:
                total.update(file.read())
                continue
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE) // (_PIECES - 1))
                total.update(file.read(_PIECE))
    return f"sha256 {total.hexdigest()[:16]}"


def record_path(name: str, run: Path) -> Path:
    """`<run>/config/<stage>.record.json`."""
    return run / "config" / f"{name}.record.json"


def write_start(name: str, run: Path, inputs: Mapping[str, str]) -> None:
    """Record what a stage starts from; what an earlier start has finished stays recorded."""
    record = _read(name, run)
    write_json(record_path(name, run), {"inputs": inputs, "trained": record.get("trained")})


def write_finished(name: str, config: Stage) -> None:
    """Record that the published model was trained to the end of the configuration."""
    record = _read(name, config.run)
    write_json(record_path(name, config.run), {**record, "trained": _length(config)})


def check_resume(name: str, config: Stage, inputs: Mapping[str, str]) -> None:
    """Check that a stage goes on with what it was started with.

    A stage without checkpoints and model may start with anything, and so may an input that an
    earlier version has not recorded.

    Raises:
        ValueError: settings that change what is learned, or the data or the model to start from,
            are others; names every difference. Or the record of the start is damaged.
        NothingToDo: its model is trained to the end of this configuration.
    """
    run = Path(config.run)
    file, final = run / "config" / f"{name}.yaml", run / "models" / name
    if not file.is_file() or not (final.exists() or (run / "checkpoints" / name).exists()):
        return
    stored = _stored(config, file)
    record = _read(name, run)
    told = differences(_settings(stored), _settings(config))
    length, trained = _length(config), record.get("trained")
    if length < (longest := max(_length(stored), trained or 0)):
        told.append(f"{_length_key(config)} {longest:g} -> {length:g}, which can only grow")
    recorded = record.get("inputs", {})
    told += [
        f"the content of {key} ({recorded[key]} -> {digest})"
        for key, digest in inputs.items()
        if key in recorded and recorded[key] != digest
    ]
    if told:
        raise ValueError(
            f"stage {name} in {run} cannot go on with --resume, because it would become another "
            f"experiment: {'; '.join(told)}. Put these back, or start in another run folder"
        )
    # The record is younger than the model only where a run was killed in between.
    if final.exists() and length == (_length(stored) if trained is None else trained):
        raise NothingToDo(
            f"{name}: nothing to do, {final} is trained to the end ({_length_key(config)} "
            f"{length:g}); a larger number goes on"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    parts = [flat(value, f"{prefix}{key}.") for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key before -> now` of every key whose values differ, in order of the keys."""
    return [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _settings(config: Stage) -> dict[str, Any]:
    """The settings that change what is learned, by their dotted names, but for the length."""
    settings = {
        key: value
        for key, value in flat(config.model_dump(mode="json")).items()
        if not any(key == free or key.startswith(f"{free}.") for free in (*FREE, *LENGTHS))
    }
    if "curriculum.stages" in settings:
        # The content of its files is compared.
        settings["curriculum.stages"] = [
            {**stage, "train_data": stage["train_data"] is not None}
            for stage in settings["curriculum.stages"]
        ]
    if "rewards.verifier_url" in settings:
        # A judge may move, but not come or go.
        settings["rewards.verifier_url"] = settings["rewards.verifier_url"] is not None
    return settings


def _length_key(config: Stage) -> str:
    return "steps" if isinstance(config, GRPO) else "epochs"


def _length(config: Stage) -> float:
    return float(getattr(config, _length_key(config)))


def _read(name: str, run: Path) -> dict[str, Any]:
    path = record_path(name, Path(run))
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; start in another run folder") from error


def _stored(config: Stage, file: Path) -> Stage:
    """The settings that a stage was started with."""
    try:
        return type(config).model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} is damaged, or of another version: {error}; start in another run folder"
        ) from error
