"""The training-step benchmark: variants agree, a wrong one is not timed, every end has a row."""

import importlib.util
import json
import math
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.training_step import __main__ as command
from benchmarks.training_step import heads, reference
from benchmarks.training_step.problem import DEFAULTS, VARIANTS, Workload
from benchmarks.training_step.worker import TOLERANCE, measure
from r1v3.engine.head import Head
from r1v3.model.parts import PARTS
from tests.processes import PATIENCE

WORKLOAD = replace(DEFAULTS["cpu"], repeats=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, tokens and reference."""
    path = tmp_path_factory.mktemp("step")
    reference.write(WORKLOAD, path)
    return path


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("hf-")])
def test_heads_agree_with_the_reference_and_are_timed(folder: Path, variant: str) -> None:
    """Fails if a variant trains on another loss than the others, or is compared in a way that
    lets errors above its dtype's rounding pass."""
    row = measure(WORKLOAD, folder, variant)
    assert row.status == "timed", row.note
    assert set(row.errors) == {"loss", *(f"grad_norm_{part}" for part in PARTS), "logprobs"}
    coarse = variant.endswith("bf16")
    assert max(row.errors.values()) < (0.05 if coarse else 5e-6)
    assert row.tolerance == TOLERANCE["bfloat16 logits" if coarse else "float32"]
    assert row.timing is not None and row.timing.samples == WORKLOAD.repeats
    assert all(norm > 1e-3 for norm in row.grad_norms.values())


def test_the_reference_is_the_loss_of_the_report(folder: Path) -> None:
    """Fails if all variants agree on a loss that is not eq. 4 and 5 on the stored numbers."""
    data, logprobs, found = reference.read(WORKLOAD, folder)
    ratio = (logprobs.double() - data.old_logprobs.double()).exp()
    advantage = data.advantages.double()[:, None]
    clipped = (ratio * advantage).minimum(ratio.clamp(0.8, 1.2) * advantage)
    assert float(-clipped.mean()) == pytest.approx(found["loss"], rel=1e-6)
    assert 0.01 < float((clipped != ratio * advantage).double().mean()) < 0.2


def test_autocast_stays_within_bfloat16(folder: Path) -> None:
    """Fails if the bfloat16 step of HFEngine, the one a GPU is timed with, computes otherwise."""
    row = measure(replace(WORKLOAD, dtype="bfloat16"), folder, "hf-fused")
    assert row.status == "timed", row.note
    assert 1e-6 < max(row.errors.values()) < 0.02


def test_a_wrong_variant_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the gate overlooks a missing clip, which changes a few tokens only."""

    def unclipped(head: Head, old: Tensor, advantages: Tensor, sequences: int) -> Any:
        return head.grpo_loss(old, advantages, clip_low=0.9, clip_high=9.0, normalizer=sequences)

    monkeypatch.setitem(heads.HEAD_LOSSES, "fused", unclipped)
    row = measure(WORKLOAD, folder, "hf-fused")
    assert row.status == "wrong"
    assert row.timing is None and row.tokens_per_second is None
    assert "error of grad_norm_llm" in row.note


def test_what_does_not_fit_is_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an allocation that the allocator refuses ends the benchmark."""

    def enormous(*_: Any) -> Any:
        return torch.empty(2**55)

    monkeypatch.setitem(heads.HEAD_LOSSES, "materialized", enormous)
    row = measure(WORKLOAD, folder, "hf-materialized")
    assert row.status == "out of memory"
    assert "allocate" in row.note


@pytest.mark.parametrize(
    ("script", "status", "note"),
    [
        ("kill -9 $$", "out of memory", "killed"),
        ("echo it broke >&2; exit 3", "failed", "it broke"),
        ("sleep 30", "failed", "no result after 0.5 s"),
    ],
)
def test_every_end_of_a_process_is_a_row(
    script: str, status: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a process that is killed, breaks or hangs takes the whole run with it."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec /bin/sh -c '{script}'\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    # Only what never ends may run into the limit, however slow the machine is.
    limit = 0.5 if script.startswith("sleep") else PATIENCE
    row = command.run(tmp_path, "hf-fused", timeout=limit)
    assert (row["status"], note in row["note"]) == (status, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "hf-fusd"], "did you mean hf-fused?"),
        (["--device", "cpu", "--prompt-tokens", "4"], "need at least 5"),
        (["--device", "cpu", "--repeats", "0"], "repeats is 0"),
        (["--device", "cpu", "--response-tokens", "5000"], "takes up to 4096"),
        (["--json", "."], "is a directory"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a mistake costs minutes of work before it is found."""
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


def test_text_only_steps_leave_the_vision_tower_alone(tmp_path: Path) -> None:
    """Fails if --tiles 0 breaks, or a gradient of a part that nothing passes through is fine."""
    workload = replace(WORKLOAD, tiles=0, prompts=1)
    reference.write(workload, tmp_path)
    row = measure(workload, tmp_path, "hf-fused")
    assert row.status == "timed", row.note
    assert row.grad_norms["vision"] == 0.0 and row.grad_norms["llm"] > 0


@pytest.mark.slow
def test_the_command_times_megatron_in_processes_of_their_own(tmp_path: Path) -> None:
    """Fails if the command line, MegatronEngine's numbers or the JSON's fields are broken."""
    target = tmp_path / "step.json"
    arguments = ["--device", "cpu", "--repeats", "2", "--variants", "megatron-fused", "trl"]
    assert command.main([*arguments, "--json", str(target)]) == 0
    document = json.loads(target.read_text(encoding="utf-8"))
    assert document["schema"] == 1 and document["benchmark"] == "training_step"
    assert {"commit", "torch", "device", "cpu", "megatron-core"} <= set(document["header"])
    assert Workload(**document["workload"]) == WORKLOAD
    assert set(document["parameters"]) == set(document["reference"]["grad_norms"]) == set(PARTS)
    megatron, trl = document["variants"]
    assert megatron["status"] == "timed", megatron["note"]
    assert max(megatron["errors"].values()) < 5e-6
    median = megatron["timing"]["median"]
    assert megatron["tokens_per_second"] == pytest.approx(document["tokens_per_step"] / median)
    assert megatron["tflops"] == pytest.approx(document["flops_per_step"] / median / 1e12)
    assert megatron["mfu"] is None and not math.isnan(median)
    assert megatron["peak_memory_bytes"] >= megatron["resident_bytes"] > 2**27
    assert trl["status"] == ("timed" if importlib.util.find_spec("trl") else "absent")
