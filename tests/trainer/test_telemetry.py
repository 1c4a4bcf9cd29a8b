"""Telemetry counts what is really computed, and Weights & Biases gets what the file gets."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from r1v3.data.encoding import collate
from r1v3.model.flops import train_flops, work_of
from r1v3.model.megatron.packing import pack
from r1v3.trainer import telemetry
from r1v3.trainer.metrics import MetricsLogger, comparable, read_metrics
from tests import tiny

ALL = {"vision": True, "connector": True, "llm": True}


def batch(group: int = 3) -> Any:
    """Two prompts of different length, `group` responses of different length each."""
    examples = [tiny.an_example(1, tiles=2, words=3), tiny.an_example(2, words=9)]
    lengths = range(3, 3 + 2 * group)
    responses = [tuple(range(30, 30 + n)) for n in lengths]
    return collate(examples, tiny.tokenizer().pad_token_id, responses=responses, group_size=group)


def test_work_of_a_batch_is_the_work_of_its_pack() -> None:
    """Fails if MFU credits padding, or a shared prompt and its image more than once."""
    given = batch()
    # A token in the middle that does not count is still an input; tokens after the last are not.
    given.loss_mask[0, 1] = False
    given.loss_mask[5, 6:] = False
    work = work_of(given)
    packed = pack(given, image_token_id=tiny.model().config.image_token_id)
    queries, keys = packed.query_starts.diff().long(), packed.key_starts.diff().long()
    assert work.tokens == len(packed.input_ids)
    assert work.attended == int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())
    assert work.labels == len(packed.token_ids)
    assert (work.tiles, work.samples) == (len(packed.pixel_values), 6)


def test_a_step_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rate is not work over time, or a CPU is given an MFU."""
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
    config, given = tiny.model().config, batch()
    meter = telemetry.Telemetry(config, ALL, device="cpu", dtype="bfloat16")
    meter.start()
    metrics = meter.finish(work_of(given) + work_of(given))
    work = work_of(given) * 2
    assert metrics["machine_tokens_per_second"] == work.tokens / 2
    assert metrics["machine_samples_per_second"] == 12 / 2
    flops = sum(train_flops(meter.dims, work, ALL).values())
    assert metrics["machine_tflops_per_device"] == pytest.approx(flops / 2 / 1e12)
    assert 0.05 < metrics["machine_memory_gb"] < 100
    assert set(metrics) == {
        "machine_tokens_per_second",
        "machine_samples_per_second",
        "machine_tflops_per_device",
        "machine_memory_gb",
    }


def test_readings_of_ranks_are_combined() -> None:
    """Fails if one rank's trouble is averaged away, or a rank without a reading hides it."""
    combined = telemetry.combine(
        [
            {"machine_memory_gb": 60.0, "machine_power_watts": 700.0, "machine_throttled": 0.0},
            {"machine_memory_gb": 71.0, "machine_power_watts": 500.0, "machine_throttled": 1.0},
            {"machine_memory_gb": 65.0},
        ]
    )
    assert combined == {
        "machine_memory_gb": 71.0,
        "machine_power_watts": 600.0,
        "machine_throttled": 1.0,
    }


def test_the_names_used_of_nvml_exist() -> None:
    """Fails if nvidia-ml-py renames what is read; whether a GPU answers is not seen here."""
    nvml = pytest.importorskip("pynvml")
    gpu = telemetry.GPU
    code = [gpu.of, gpu.start, gpu.finish, gpu._power, gpu._throttled, gpu._watch_errors]
    names = {name for function in [*code, gpu._errors] for name in function.__code__.co_names}
    used = {name for name in names if name.lower().startswith("nvml") and name != "nvml"}
    assert len(used) > 12
    assert [name for name in sorted(used | set(gpu.THROTTLES)) if not hasattr(nvml, name)] == []


class RecordedRun:
    """The part of `wandb.Run` that a test needs."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.lines, self.metrics, self.finished = settings, [], [], False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.lines.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedRun]:
    """Runs that were begun through a stand-in for wandb, which is not installed here."""
    begun: list[RecordedRun] = []

    def init(**settings: Any) -> RecordedRun:
        begun.append(RecordedRun(**settings))
        return begun[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return begun


def test_weights_and_biases_gets_every_step_and_resumes_its_run(
    tmp_path: Path, runs: list[RecordedRun]
) -> None:
    """Fails if a resumed stage starts another run, or a list or NaN is sent as a number."""
    first = {"loss": 0.5, "entropy_histogram": [1, 2], "bad": float("nan"), "none": None}
    for resume_after in (None, 1, None):
        with MetricsLogger(
            tmp_path, "grpo", resume_after=resume_after, tensorboard=False, wandb_project="vision"
        ) as log:
            log.log(2, first)
    assert [run.settings["id"] for run in runs[:2]] == [runs[0].settings["id"]] * 2
    assert runs[2].settings["id"] != runs[0].settings["id"]
    assert runs[0].settings["project"] == "vision" and runs[0].settings["resume"] == "allow"
    assert runs[0].lines == [{"step": 2, "loss": 0.5}]
    assert ("*", "step") in runs[0].metrics
    assert all(run.finished for run in runs)


def test_without_wandb_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a run goes on unlogged, or leaves an empty metrics file behind."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'r1v3\[wandb\]'"):
        MetricsLogger(tmp_path, "grpo", wandb_project="vision")
    assert not (tmp_path / "metrics" / "grpo.jsonl").exists()


def test_what_the_machine_did_is_not_compared(tmp_path: Path) -> None:
    """Fails if telemetry makes two runs of one seed differ."""
    with MetricsLogger(tmp_path, "grpo", tensorboard=False) as log:
        log.log(1, {"loss": 0.5, "machine_mfu": 0.4, "seconds_rollout": 3.0})
    assert comparable(read_metrics(log.path)) == [{"step": 1, "loss": 0.5}]
