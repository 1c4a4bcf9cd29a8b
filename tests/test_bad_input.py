"""Input that is wrong: one line that names the thing and the remedy, and nothing is lost."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1v3.data.schema import load_samples, write_samples
from r1v3.trainer.checkpoint import load_checkpoint
from r1v3.trainer.metrics import read_metrics
from tests.tiny_run import (
    digest,
    finished,
    home,
    leftovers,
    result,
    stage_arguments,
    succeed,
    verb,
    write_configs,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_configs(tmp_path)
    return tmp_path


def copy_of(stage: str, target: Path) -> Path:
    """A copy of a finished run that can be damaged."""
    whole, _ = finished(stage)
    shutil.copytree(whole / "run", target / "run")
    return target / "run"


def snapshot(run: Path) -> dict[str, str]:
    return {str(p.relative_to(run)): digest(p) for p in sorted(run.rglob("*")) if p.is_file()}


def half_a_jpeg() -> bytes:
    """A picture whose header is fine and whose pixels break off."""
    import io

    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[:900]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_an_unreadable_picture_is_named_by_file_and_row(folder: Path, stage: str) -> None:
    """Otherwise one broken picture among thousands could not be found, or would be found only
    when steps had been taken."""
    samples = load_samples(home() / "short/validation.parquet")
    samples[3] = samples[3].model_copy(update={"images": [half_a_jpeg()]})
    write_samples(folder / "broken.parquet", samples)
    outcome = verb(folder, *stage_arguments(stage), "validation_data=broken.parquet")
    assert "broken.parquet row 3: image" in outcome.error()
    assert not (folder / "run/metrics").exists()


def test_a_row_of_the_wrong_schema_is_named_by_file_and_row(folder: Path) -> None:
    """Otherwise a typing error in a data file would surface as a KeyError."""
    lines = [{"prompt": "not a list", "data_source": "x"}, {"nothing": 1}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    message = verb(folder, *stage_arguments("sft"), "train_data=rows.jsonl").output
    assert "rows.jsonl: 2 wrong rows" in message and "Traceback" not in message
    assert "line 1: " in message and "line 2: " in message and "prompt" in message


def test_an_empty_dataset_is_named(folder: Path) -> None:
    """Otherwise training on nothing would divide by zero."""
    table = pq.read_table(home() / "run/data/grpo.parquet").slice(0, 0)
    pq.write_table(pa.Table.from_batches([], table.schema), folder / "empty.parquet")
    error = verb(folder, *stage_arguments("grpo"), "train_data=empty.parquet").error()
    assert "empty.parquet" in error and "no samples" in error


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("optimiser.learning_rate=1", "unknown key `optimiser` (did you mean `optimizer`?)"),
        ("optimizer.lerning_rate=1", "(did you mean `learning_rate`?)"),
        ("batch_size=7", "batch_size 7 must be a multiple of micro_batch_size 8"),
        ("epochs=often", "`epochs` = 'often'"),
        ("batch_size", "must look like key=value"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(
    folder: Path, override: str, wanted: str
) -> None:
    """Otherwise a misspelled setting would be ignored and the default used."""
    assert wanted in verb(folder, *stage_arguments("sft"), override).error()
    assert not (folder / "run").exists()


def test_a_missing_base_model_is_named(folder: Path) -> None:
    """Otherwise the error would be one of a library, about a hub."""
    error = verb(folder, "sft", "configs/sft.yaml", "model=nowhere").error()
    assert "nowhere has no tokenizer.json" in error or "nowhere has no config.json" in error


def test_a_missing_configuration_is_named(folder: Path) -> None:
    """Otherwise a mistyped path would be a traceback."""
    assert (
        "cannot read the configuration nowhere.yaml" in verb(folder, "sft", "nowhere.yaml").error()
    )


def test_starting_over_a_finished_stage_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Otherwise a forgotten --resume would destroy a run, or its record of how it was made."""
    run = copy_of("sft", tmp_path)
    write_configs(tmp_path)
    before = snapshot(run)
    outcome = verb(tmp_path, *stage_arguments("sft"), "seed=5")
    assert "run already holds stage sft; pass --resume" in outcome.error()
    assert snapshot(run) == before


@pytest.mark.parametrize("stage", ["sft", "grpo", "connector"])
def test_resuming_what_was_never_started_is_refused(folder: Path, stage: str) -> None:
    """Otherwise a mistyped run folder would quietly train from the beginning."""
    outcome = verb(folder, *stage_arguments(stage), "run=runs/typo", "--resume")
    assert f"runs/typo holds no stage {stage} to resume" in outcome.error()
    assert "without --resume" in outcome.error()
    assert not (folder / "runs").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_checkpoint_cut_short_is_skipped_with_a_warning(tmp_path: Path) -> None:
    """Otherwise one bad block on a disk would end a run that has an intact checkpoint."""
    whole, _ = finished("sft")
    run = copy_of("sft", tmp_path)
    write_configs(tmp_path)
    shutil.rmtree(run / "models")
    cut(run / "checkpoints/sft/step-000006/trainer.safetensors")
    outcome = succeed(tmp_path, *stage_arguments("sft"), "--resume")
    assert "step-000006/trainer.safetensors" in outcome.output and "skipped" in outcome.output
    assert result(run, "sft") == result(whole / "run", "sft")


def test_without_an_intact_checkpoint_the_broken_file_is_named(tmp_path: Path) -> None:
    """Otherwise a resumed run would start from the beginning and delete what could be rescued."""
    run = copy_of("grpo", tmp_path)
    write_configs(tmp_path)
    shutil.rmtree(run / "models")
    for path in (run / "checkpoints/grpo").glob("step-*/model.safetensors"):
        cut(path)
    metrics = (run / "metrics/grpo.jsonl").read_bytes()
    outcome = verb(tmp_path, *stage_arguments("grpo"), "--resume")
    assert "step-000004/model.safetensors has" in outcome.error()
    assert (run / "metrics/grpo.jsonl").read_bytes() == metrics


def test_a_file_size_limit_stops_the_stage_and_loses_nothing(folder: Path) -> None:
    """Otherwise a quota would leave half a model behind, or a traceback."""
    whole, _ = finished("sft")
    size = (whole / "run/models/sft/model.safetensors").stat().st_size
    outcome = verb(folder, *stage_arguments("sft"), limit=size // 2)
    assert "sft-best" in outcome.error() and "free some space" in outcome.error()
    assert leftovers(folder / "run") == []
    assert not list((folder / "run/checkpoints").rglob("*.safetensors"))
    succeed(folder, *stage_arguments("sft"), "--resume")
    assert result(folder / "run", "sft") == result(whole / "run", "sft")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    for _ in range(100):
        # A worker of the last verb may still be about to end.
        if subprocess.run(["umount", str(disk)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_stops_the_stage_and_loses_nothing(small_disk: Path) -> None:
    """Otherwise the checkpoint that no longer fits would take earlier ones with it."""
    write_configs(small_disk)
    arguments = [*stage_arguments("grpo"), "checkpoint_every=1", "steps=4", "keep=9"]
    outcome = verb(small_disk, *arguments)
    assert "free" in outcome.error() and "checkpoint of step" in outcome.error()
    run = small_disk / "run"
    saved = sorted((run / "checkpoints/grpo").glob("step-*"))
    assert saved and not leftovers(run)
    for path in saved:
        load_checkpoint(path)
    assert len(read_metrics(run / "metrics/grpo.jsonl")) >= len(saved)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    succeed(small_disk, *arguments, "--resume")
    whole, _ = finished("grpo")
    mine, other = result(run, "grpo"), result(whole / "run", "grpo")
    assert (mine["metrics"], mine["weights"]) == (other["metrics"], other["weights"])
