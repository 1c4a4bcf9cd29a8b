"""The supervised loop, run for real on a tiny model: killed, interrupted, split and resumed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from r1v3.config import SFT, Optimizer, Pictures, load
from r1v3.data.encoding import model_image_shape
from r1v3.trainer.metrics import read_metrics
from r1v3.trainer.supervised import Best, SupervisedTrainer
from tests.tiny_run import (
    check_kills,
    digest,
    finished,
    go_on,
    home,
    leftovers,
    result,
    seeded_moments,
    stage_arguments,
    with_positions,
    write_configs,
)

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "stage", ["sft", pytest.param("grpo", marks=SLOW), pytest.param("connector", marks=SLOW)]
)
def test_a_killed_process_of_python_m_r1v3_resumes_to_the_same_bits(
    tmp_path: Path, stage: str
) -> None:
    """Otherwise the module's entry point would not be what the other kill tests run."""
    whole, _ = finished(stage)
    write_configs(tmp_path)
    metrics = tmp_path / f"run/metrics/{stage}.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "r1v3", *stage_arguments(stage)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (metrics.exists() and b'"step": 3' in read(metrics)):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert metrics.exists()
    assert go_on(tmp_path, stage).code == 0
    assert result(tmp_path / "run", stage) == result(whole / "run", stage)


def read(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("chain", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_and_resume_change_no_bit(tmp_path: Path, chain: int) -> None:
    """Otherwise a run that was preempted would not be the run that was reported."""
    moments = seeded_moments("sft", 2)
    check_kills(tmp_path, "sft", moments if chain else moments[::-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_names_resume_and_exits_130(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Otherwise Ctrl-C would lose the steps since the last checkpoint, or leave no way on."""
    whole, changes = finished("sft")
    write_configs(tmp_path)
    first_metrics = next(n for n, path in enumerate(changes, 1) if path.endswith("sft.jsonl"))
    stopped = go_on(tmp_path, "sft", at=first_metrics, number=number)
    assert stopped.code == 130
    assert "--resume" in stopped.output and "Traceback" not in stopped.output
    steps = [line["step"] for line in read_metrics(tmp_path / "run/metrics/sft.jsonl")]
    assert (tmp_path / f"run/checkpoints/sft/step-{steps[-1]:06d}").is_dir()
    assert go_on(tmp_path, "sft").code == 0
    assert result(tmp_path / "run", "sft")["weights"] == result(whole / "run", "sft")["weights"]
    assert result(tmp_path / "run", "sft")["metrics"] == result(whole / "run", "sft")["metrics"]


def test_resuming_a_finished_stage_changes_nothing() -> None:
    """Otherwise `demo --resume` would train finished stages again."""
    folder, _ = finished("sft")
    before = result(folder / "run", "sft")
    again = go_on(folder, "sft")
    assert again.code == 0 and "models/sft" in again.output
    assert "sft: nothing to do, " in again.output and "Warning" not in again.output
    assert result(folder / "run", "sft") == before
    assert leftovers(folder / "run") == []


def test_a_kill_before_old_checkpoints_are_removed_leaves_none_of_them(tmp_path: Path) -> None:
    """Fails if every kill at that moment keeps a checkpoint more on the disk for good."""
    whole, _ = finished("sft")
    write_configs(tmp_path)
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/models")
    saved = tmp_path / "run/checkpoints/sft"
    shutil.copytree(saved / "step-000004", saved / "step-000002")
    outcome = go_on(tmp_path, "sft")
    assert outcome.code == 0 and "sft: no step is left after 6 of 6" in outcome.output
    assert result(tmp_path / "run", "sft") == result(whole / "run", "sft")


def test_the_resolved_configuration_is_the_first_thing_written() -> None:
    """Otherwise a run that fails early would not say what it was."""
    folder, changes = finished("sft")
    files = [path for path in changes if not path.endswith(("run", "run/config"))]
    assert "run/config/.sft.yaml" in files[0]
    resolved = load(SFT, folder / "run/config/sft.yaml")
    given = load(SFT, folder / "configs/sft.yaml", stage_arguments("sft")[2:])
    assert given.max_tiles is None  # left to the model, whose own number is recorded
    assert resolved == given.model_copy(update={"max_tiles": 1})


def config(run: Path, *overrides: str) -> SFT:
    write_configs(run)
    arguments = [f"run={run / 'run'}", f"model={home() / 'base'}", *overrides]
    return load(SFT, run / "configs/sft.yaml", arguments)


@pytest.mark.parametrize(("told", "recorded"), [(None, 3), (2, 2), (1, 1)])
def test_the_number_of_tiles_is_the_models_own_unless_told(
    tmp_path: Path, told: int | None, recorded: int
) -> None:
    """Fails if a stage shows a model other tiles than it was made for, or forgets what it showed:
    the run's configuration and the model that it hands on say it."""
    override = [] if told is None else [f"max_tiles={told}"]
    settings = config(tmp_path, *override, f"model={tmp_path / 'base'}")
    shutil.copytree(home() / "base", tmp_path / "base")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_dynamic_patch": 3}))
    trainer = SupervisedTrainer("sft", settings, resuming=False)
    assert load(SFT, tmp_path / "run/config/sft.yaml").max_tiles == recorded
    assert model_image_shape(trainer.engine.config).max_tiles == recorded
    assert trainer.config.pictures == Pictures(ground="white", truncated="error")


def test_micro_batches_do_not_change_a_step(tmp_path: Path) -> None:
    """Otherwise the loss would weigh tokens by the micro-batch they happened to be in."""
    metrics, weights = [], []
    for size in (16, 4):
        trainer = SupervisedTrainer(
            "sft", config(tmp_path / str(size), f"micro_batch_size={size}"), resuming=False
        )
        metrics.append(trainer.take_step())
        weights.append({n: p.detach().clone() for n, p in trainer.engine.trainable.items()})
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)
    assert metrics[0]["tokens"] == metrics[1]["tokens"]
    moved = [(weights[0][n] - weights[1][n]).abs().median() for n in weights[0]]
    assert max(moved) < 1e-6


def test_the_step_loss_is_the_mean_cross_entropy_of_response_tokens(tmp_path: Path) -> None:
    """Otherwise prompts or padding would be trained on."""
    from r1v3.trainer.randomness import order
    from r1v3.trainer.supervised import micro_batches, validation_loss

    trainer = SupervisedTrainer("sft", config(tmp_path), resuming=False)
    chosen = order(len(trainer.train), 0, 16, 0, "sft", "order")
    examples = [trainer.train[i] for i in chosen]
    batch = micro_batches(examples, 16, trainer.engine.tokenizer.pad_token_id)[0]
    [(logprobs, _)] = trainer.engine.evaluate([batch])
    expected = -float(logprobs[batch.loss_mask].double().mean())
    assert validation_loss(trainer.engine, examples, 16) == pytest.approx(expected, rel=1e-5)
    assert trainer.take_step()["loss"] == pytest.approx(expected, rel=1e-5)


def test_every_part_is_trained() -> None:
    """Otherwise cold-start SFT would leave the vision tower or the connector as it was."""
    folder, _ = finished("sft")
    before = load_file(home() / "base/model.safetensors")
    after = load_file(folder / "run/models/sft/model.safetensors")
    same = [name for name in before if before[name].equal(after[name])]
    assert same == []


def test_best_counts_validations_without_a_better_loss() -> None:
    """Otherwise early stopping would stop too early, or on a tie never."""
    best = Best()
    seen = [(loss, best.update(loss, step), best.stale) for step, loss in enumerate([2, 1, 1, 3])]
    assert seen == [(2, True, 0), (1, True, 0), (1, False, 1), (3, False, 2)]
    assert (best.loss, best.step) == (1, 1)


def test_early_stopping_ends_the_stage_and_keeps_the_best(tmp_path: Path) -> None:
    """Otherwise a stage that only gets worse would run to its end and hand on its end."""
    write_configs(tmp_path)
    worse = ["optimizer.learning_rate=0.5", "epochs=4", "early_stopping=2", "validate_every=1"]
    trainer = SupervisedTrainer("sft", config(tmp_path, *worse), resuming=False)
    trainer.loop()
    assert trainer.best.stale == 2 and trainer.step == trainer.best.step + 2 < trainer.total
    kept = load_file(tmp_path / "run/checkpoints/sft-best/model.safetensors")
    live = dict(trainer.engine.export_hf())
    assert any(not kept[name].equal(live[name]) for name in kept)


def test_the_tiny_base_is_the_same_every_time() -> None:
    """Otherwise the bits compared in this folder would prove nothing about seeds."""
    assert digest(home() / "base/model.safetensors") == digest(
        home() / "run/checkpoints/sft-best/model.safetensors"
    )


def test_samples_over_the_greatest_length_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise one long sample would end a run by running out of memory, or vanish unseen."""
    every = SupervisedTrainer("sft", config(tmp_path), resuming=False).train
    lengths = sorted(len(e.prompt_ids) + len(e.response_ids) for e in every)
    limit = lengths[len(lengths) // 2]
    some = config(tmp_path, f"run={tmp_path / 'short'}", f"max_length={limit}")
    kept = SupervisedTrainer("sft", some, resuming=False).train
    assert len(kept) == sum(length <= limit for length in lengths) < len(every)
    assert f"{len(every) - len(kept)} of {len(every)} samples" in capsys.readouterr().out
    none = config(tmp_path, f"run={tmp_path / 'none'}", "max_length=3")
    with pytest.raises(ValueError, match="max_length 3 tokens; none is left"):
        SupervisedTrainer("sft", none, resuming=False)


@pytest.mark.parametrize(
    ("rows", "epochs", "size"),
    [
        (70, 1, 32),
        (33, 1, 32),
        (100, 2, 64),
        (91, 3, 16),
        (10, 1, 64),
        (5, 4, 8),
        (1, 7, 3),
        (47, 1, 46),
        (64, 2, 64),
        (81, 1.5, 20),
        (30, 0.5, 4),
        (12, 0.01, 4),
    ],
)
def test_every_pass_takes_each_row_once(rows: int, epochs: float, size: int) -> None:
    """Fails if the rest of an epoch is lost by rounding, or rows are repeated to fill a batch."""
    trainer = SupervisedTrainer.__new__(SupervisedTrainer)
    trainer.name, trainer.step, trainer.seen, trainer.best = "sft", 0, 0, Best()
    trainer.train = [None] * rows  # type: ignore[list-item]
    trainer.config = SFT(
        run=Path("r"),
        model=Path("m"),
        train_data=Path("t"),
        validation_data=Path("v"),
        optimizer=Optimizer(learning_rate=1.0),
        epochs=epochs,
        batch_size=size,
        micro_batch_size=1,
    )
    batches, total = [], trainer.total
    while not trainer.finished:
        assert trainer.total == total
        batches.append(trainer.next_rows())
        trainer.step += 1
    assert trainer.step == total == len(batches)
    assert {len(batch) for batch in batches[:-1]} <= {size} and 0 < len(batches[-1]) <= size
    taken = [row for batch in batches for row in batch]
    assert len(taken) == max(1, round(rows * epochs))
    for start in range(0, len(taken), rows):
        one_pass = taken[start : start + rows]
        assert len(set(one_pass)) == len(one_pass)


def test_rows_beyond_the_models_positions_are_refused_or_dropped_and_counted(
    tmp_path: Path,
) -> None:
    """Fails if the stage trains at positions that the model does not have, or hides what it
    drops."""
    made = SupervisedTrainer("sft", config(tmp_path), resuming=False)
    lengths = sorted(len(e.prompt_ids) + len(e.response_ids) for e in made.train)
    limit = lengths[len(lengths) // 2]
    base = with_positions(tmp_path / "base", limit)
    small = [f"model={base}", f"run={tmp_path / 'small'}"]
    with pytest.raises(ValueError, match=rf"exceed the model's {limit} positions .* row \d+: "):
        SupervisedTrainer("sft", config(tmp_path, *small), resuming=False)
    dropping = config(tmp_path, *small, "too_long=drop", "epochs=1", "batch_size=8")
    trainer = SupervisedTrainer("sft", dropping, resuming=False)
    kept = sum(length <= limit for length in lengths)
    assert len(trainer.train) == kept < len(lengths)
    assert trainer.take_step()["rows_dropped"] == len(lengths) - kept
