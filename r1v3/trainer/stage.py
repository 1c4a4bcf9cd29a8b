"""The run folder of a training stage: opened, resumed from, and published to."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError

from r1v3.config import GRPO, Section, Supervised, to_yaml
from r1v3.data.sample import Sample
from r1v3.data.schema import load_samples
from r1v3.engine.build import connect
from r1v3.engine.contract import Engine
from r1v3.environment import environment
from r1v3.files import (
    remove_leftovers,
    replace_directory,
    temporary_sibling,
    write_json,
    write_text,
)
from r1v3.progress import say
from r1v3.ranks import Ranks
from r1v3.trainer.checkpoint import Loaded, load_checkpoint, load_latest
from r1v3.trainer.record import NothingToDo, check_resume, differences, digests, flat, write_start


def require_fresh(name: str, run: Path, resuming: bool) -> None:
    """Refuse to start a stage over the files of an earlier run of it, before anything is written.

    Raises:
        ValueError: the stage has checkpoints or a model and `resuming` is False.
    """
    left = [run / "models" / name, run / "checkpoints" / name]
    if not resuming and any(path.exists() for path in left):
        raise ValueError(
            f"{run} already holds stage {name}; pass --resume to go on, or another run folder"
        )


def begin(name: str, config: Section, run: Path) -> None:
    """Write the resolved configuration and the environment into the run folder.

    A warning names every value that differs from an earlier start of the stage.
    """
    file = run / "config" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        before = flat(yaml.safe_load(file.read_text(encoding="utf-8")))
        now = flat(config.model_dump(mode="json"))
        if changes := differences(before, now):
            warnings.warn(
                f"{name} goes on with another configuration: {', '.join(changes)}", stacklevel=2
            )
    write_text(file, to_yaml(config))
    if not (run / "environment.json").exists():
        write_json(run / "environment.json", environment())


@dataclass(frozen=True)
class OpenStage:
    """A stage whose run folder is begun: its processes and its samples.

    Attributes:
        further: samples of the files that only stages of a curriculum name.
    """

    ranks: Ranks
    train: list[Sample]
    validation: list[Sample]
    further: dict[Path, list[Sample]]


def open_stage(name: str, config: Supervised | GRPO, *, resuming: bool) -> OpenStage:
    """Connect the ranks, read the data and begin the run folder.

    Raises:
        ValueError: as `connect`, `require_fresh`, `load_samples` and `check_resume`.
        NothingToDo: as `check_resume`; its message is printed.
    """
    ranks, run = connect(config), Path(config.run)
    ranks.on_main(lambda: require_fresh(name, run, resuming))
    train, validation = load_samples(config.train_data), load_samples(config.validation_data)
    stages = config.curriculum.stages if isinstance(config, GRPO) else ()
    files = {one.train_data for one in stages} - {None, config.train_data}
    further = {file: load_samples(file) for file in sorted(file for file in files if file)}

    def first() -> None:
        data = {"train_data": train, "validation_data": validation}
        for i, one in enumerate(stages):
            if one.train_data in further:
                data[f"curriculum.stages[{i}].train_data"] = further[one.train_data]
        inputs = digests(config, data)
        if resuming:
            try:
                check_resume(name, config, inputs)
            except NothingToDo as done:
                say(str(done))
                raise
        begin(name, config, run)
        write_start(name, run, inputs)

    ranks.on_main(first)
    return OpenStage(ranks, train, validation, further)


def resume(name: str, run: Path, engine: Engine, wanted: bool) -> Loaded | None:
    """Load the newest intact checkpoint of a stage into the engine, if `wanted`.

    Returns:
        The checkpoint, or None where the stage starts from its beginning.

    Raises:
        CheckpointError: all checkpoints are broken; names a file of the newest.
    """
    root = run / "checkpoints" / name
    if not wanted or not root.exists():
        return None
    # Half-written or half-deleted folders of a killed run; nothing else would remove them.
    engine.ranks.on_main(lambda: remove_leftovers(root, ".step-*.tmp"))
    loaded = load_latest(root, engine.ranks)
    if loaded is None:
        broken = sorted(root.glob("step-*"))
        if not broken:
            return None
        loaded = load_checkpoint(broken[-1], engine.ranks)
    engine.load_state(loaded.path, loaded.tensors)
    return loaded


def publish(engine: Engine, folder: Path) -> None:
    """Write the engine's weights as a model folder, replacing an earlier one in one move.

    Raises:
        OSError: it cannot be written; an earlier folder is unchanged.
    """

    def prepare() -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, f".{folder.name}.*.tmp")
        temporary = temporary_sibling(folder)
        temporary.mkdir()
        return temporary

    temporary = engine.ranks.on_main(prepare)
    try:
        engine.save(temporary)
        engine.ranks.on_main(lambda: replace_directory(temporary, folder))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError | OSError):
            raise OSError(
                f"cannot write the model folder {folder}: {error}; free some space and go on "
                "with --resume"
            ) from error
        raise
