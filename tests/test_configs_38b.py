"""The presets of the 38B: the report's numbers, and a plan that fits every stated cluster."""

import json
import os
import re
import signal
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import InternVLConfig

from r1v3.config import GRPO, load
from r1v3.model.flops import Dimensions
from r1v3.plan.job import TEXT_TOKENS, Cluster, job_of, model_folder
from r1v3.plan.plan import Plan, make_plan
from r1v3.plan.run import stage_kind
from r1v3.plan.schedule import stage_costs
from r1v3.plan.search import on_more_gpus, propose
from tests.processes import PATIENCE

FOLDER = Path(__file__).parents[1] / "configs" / "r1v3-38b"
LAUNCH = FOLDER / "launch"
GRPO_PRESETS = ("grpo_4k", "grpo_8k", "grpo_16k", "grpo_32k")
TRAINING = ("sft", *GRPO_PRESETS, "connector")
PRESETS = (*TRAINING, "eval")


def preset(name: str, *overrides: str) -> Any:
    path = FOLDER / f"{name}.yaml"
    return load(stage_kind(path, None), path, overrides)


@cache
def dims() -> Dimensions:
    return Dimensions.of(InternVLConfig.from_pretrained(FOLDER / "model"))


def planned(name: str, gpus: int, *overrides: str) -> Plan:
    """By formulas, which `tests/model/test_plan.py` compares with the built modules."""
    return make_plan(job_of(preset(name, *overrides), dims(), Cluster(gpus)), dims())


def test_every_file_is_a_preset() -> None:
    """Fails if a file is added that no test below looks at."""
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(PRESETS)
    assert model_folder(preset("sft"), FOLDER / "sft.yaml") == FOLDER / "model"


def test_the_report_s_numbers() -> None:
    """Fails if a preset no longer trains what the report trained."""
    for name, tokens in zip(GRPO_PRESETS, (4096, 8192, 16384, 28672), strict=True):
        grpo = preset(name)
        assert (grpo.prompts_per_step, grpo.group_size, grpo.gradient_steps) == (32, 32, 1)
        assert (grpo.loss.clip_low, grpo.loss.clip_high, grpo.loss.kl_coef) == (0.2, 0.2, 0.0)
        assert grpo.loss.aggregation == "sequence-mean" and grpo.rewards.accuracy_weight == 0.8
        assert grpo.optimizer.learning_rate == 1e-5 and grpo.decoding.max_tokens == tokens
        assert all(grpo.modules.model_dump().values())
        assert grpo.rollout.engine == "vllm"
    connector = preset("connector")
    assert (connector.epochs, connector.batch_size, connector.max_length) == (2, 64, 16384)
    assert connector.modules.model_dump() == {"vision": False, "connector": True, "llm": False}
    assert connector.early_stopping is not None
    for name in ("sft", "connector"):
        optimizer = preset(name).optimizer
        assert (optimizer.learning_rate, optimizer.warmup_ratio) == (1e-5, 0.03)
        assert optimizer.schedule == "cosine" and preset(name).batch_size == 64
    evaluation = preset("eval")
    assert (evaluation.decoding.temperature, evaluation.decoding.max_tokens) == (1.0, 16384)
    assert evaluation.samples == 5 and set(evaluation.modes) == {"slow", "nothink", "nowait"}
    assert (min(evaluation.budgets), max(evaluation.budgets)) == (1024, 16384)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("gpus", [32, 64, 128, 256])
def test_a_preset_fits_80_gb(name: str, gpus: int) -> None:
    """Fails if a team that starts from the preset would run out of memory."""
    config = preset(name)
    assert (config.engine, config.dtype, config.device) == ("megatron", "bfloat16", "cuda")
    plan = planned(name, gpus)
    assert plan.problems == [] and plan.overflow < -0.5e9
    assert sum(plan.parameters.values()) == 38_388_164_992


@pytest.mark.parametrize("name", GRPO_PRESETS)
def test_grpo_uses_every_gpu_of_a_larger_cluster(name: str) -> None:
    """Fails if groups that are not divided leave replicas idle, or a stage waits for another."""
    plans = {gpus: planned(name, gpus) for gpus in (32, 64, 128, 256)}
    for plan in plans.values():
        assert plan.job.micro_batches >= 6 * plan.job.data
        stages = stage_costs(
            dims(), plan.job.work, plan.job.shards.layers, dict.fromkeys(plan.parameters, True)
        )
        assert max(map(sum, stages)) <= 0.53 * sum(map(sum, stages))
        assert plan.job.sequence_tokens <= 32768
    assert plans[64].seconds > 3.5 * plans[256].seconds
    undivided = planned(name, 64, "micro_batch_tokens=null")
    assert undivided.fits == (name == "grpo_4k")


def test_64k_is_divided_among_context_parallel_ranks() -> None:
    """Fails if the preset of 65,536 tokens would not fit its clusters, differs from the 32k's in
    more than its length, or a rank's activations do not fall with the ranks that share them."""
    file = FOLDER.parent / "r1v3-38b-64k" / "grpo.yaml"
    config = load(GRPO, file)
    assert model_folder(config, file) == file.parent / "model"
    longer = Dimensions.of(InternVLConfig.from_pretrained(file.parent / "model"))
    model, of_32k = (
        json.loads((folder / "model" / "config.json").read_text())
        for folder in (file.parent, FOLDER)
    )
    theta = model["text_config"]["rope_parameters"].pop("rope_theta")
    assert theta == pytest.approx(1e6 * 3 ** (128 / 126))
    of_32k["text_config"]["rope_parameters"].pop("rope_theta")
    of_32k["text_config"]["max_position_embeddings"] = 65536
    assert model == of_32k
    changed = {"run", "model", "decoding", "micro_batch_tokens", "parallel"}
    shorter = preset("grpo_32k").model_dump(exclude=changed)
    assert config.model_dump(exclude=changed) == shorter
    for gpus in (32, 64, 128, 256):
        plan = make_plan(job_of(config, longer, Cluster(gpus)), longer)
        assert plan.problems == [] and plan.overflow < -0.5e9
        assert 65000 < plan.job.sequence_tokens <= 65536
    moving = {}
    for context in (1, 2, 4):
        split = load(GRPO, file, [f"parallel.context={context}"])
        plan = make_plan(job_of(split, longer, Cluster(64)), longer)
        moving[context] = [rank.activations for rank in plan.ranks if rank.activations is not None]
    for context in (2, 4):
        # 13 tiles do not divide evenly, and a rank holds all keys and values of its layer.
        for whole, part, more in zip(moving[1], moving[context], (1.1, 1.01), strict=True):
            assert part.kept * context < more * whole.kept
            assert part.layer * context < 1.1 * whole.layer


@pytest.mark.slow
def test_a_sequence_too_long_for_a_gpu_is_divided() -> None:
    """Fails if the plan would not say that context parallelism makes a single sequence fit."""
    file = FOLDER.parent / "r1v3-38b-64k" / "grpo.yaml"
    longer = Dimensions.of(InternVLConfig.from_pretrained(file.parent / "model"))
    alone = ["parallel.context=1", "micro_batch_tokens=65536", "rollout.engine=vllm-server"]
    alone.append("rollout.urls=['http://server:8000/v1']")
    small = Cluster(64, memory=44e9)
    assert not make_plan(job_of(load(GRPO, file, alone), longer, small), longer).fits
    proposals = propose(
        lambda changes: load(GRPO, file, [*alone, *changes]),
        longer,
        small,
        text_tokens=TEXT_TOKENS,
    )
    assert ("parallel.context=2",) in [proposal.overrides for proposal in proposals]


def test_a_budget_of_less_than_one_sequence_is_named() -> None:
    """Fails if a plan is made of micro-batches that the trainer refuses."""
    with pytest.raises(ValueError, match="a response of 8192 tokens; set it to 12031 or more"):
        planned("grpo_8k", 64, "micro_batch_tokens=12030")
    assert planned("grpo_8k", 64, "micro_batch_tokens=12031").fits


def test_the_evaluation_fits_one_node() -> None:
    """Fails if the weights leave no room for the longest answers."""
    plan = planned("eval", 8)
    assert plan.problems == []
    rollout = plan.ranks[0].rollout
    assert rollout is not None and (rollout.sequences or 0) >= 16


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_names_its_source_or_is_of_the_layout(name: str) -> None:
    """Fails if a preset stops saying where its numbers are from."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(re.findall(r"#.*(report|RL settings|grpo_4k\.yaml)", text)) >= 2
    assert f"{name}.yaml" in text or name == "sft"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("parallel.recompute=none",), "parallel.recompute=full"),
        (("rollout.memory_share=0.9",), "rollout.memory_share="),
        (("rollout.memory_share=0.1",), "rollout.memory_share="),
        (("micro_batch_prompts=4", "micro_batch_tokens=null"), "micro_batch_tokens="),
        (("decoding.max_tokens=16384", "micro_batch_tokens=null"), "micro_batch_tokens="),
        (("micro_batch_prompts=32", "micro_batch_tokens=262144"), "micro_batch_"),
        (("parallel.tensor=1", "parallel.sequence=false", "rollout.tensor=8"), "parallel.tensor="),
    ],
)
def test_what_does_not_fit_comes_with_what_would(overrides: tuple[str, ...], expected: str) -> None:
    """Fails if the plan says no and leaves the user alone, or proposes what does not fit."""
    assert planned("grpo_8k", 64, *overrides).problems
    proposals = propose(
        lambda changes: preset("grpo_8k", *overrides, *changes),
        dims(),
        Cluster(64),
        text_tokens=TEXT_TOKENS,
    )
    assert proposals
    for proposal in proposals:
        assert planned("grpo_8k", 64, *overrides, *proposal.overrides).fits
    assert any(expected in setting for p in proposals for setting in p.overrides)


@pytest.mark.parametrize(
    ("gpus", "overrides", "wanted"),
    [
        (8, (), 16),
        pytest.param(
            64,
            ("decoding.max_tokens=2000000", "micro_batch_tokens=null"),
            None,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_more_gpus_are_promised_only_where_they_do(
    gpus: int, overrides: tuple[str, ...], wanted: int | None
) -> None:
    """Fails if a user is sent to buy GPUs that do not help, or not to those that do."""

    def loader(changes: Any) -> Any:
        return preset("grpo_8k", *overrides, *changes)

    assert propose(loader, dims(), Cluster(gpus), text_tokens=TEXT_TOKENS) == []
    found = on_more_gpus(loader, dims(), Cluster(gpus), text_tokens=TEXT_TOKENS)
    assert (None if found is None else found[0]) == wanted
    if found is not None:
        assert planned("grpo_8k", found[0], *overrides, *found[1].overrides).fits


def test_scripts_are_clean() -> None:
    """Fails if a launch script does not parse or would go on after an error."""
    for script in LAUNCH.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK)
        assert "set -euo pipefail" in script.read_text(encoding="utf-8")


STAND_IN = """#!/usr/bin/env bash
# torchrun with one worker, which takes a second to save; dies of a signal itself.
echo "$@" > arguments
bash -c 'trap "sleep 1; echo saved > worker; exit 130" TERM; touch ready
         while :; do sleep 0.05; done' &
wait $!
exit 1
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_workers_and_not_torchrun(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Fails if a preempted job is killed by torchrun before it has saved."""
    stand_in = tmp_path / "torchrun"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "torchrun.sh"), "grpo", "some.yaml", "--resume"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "2"},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(number)
        assert job.wait(timeout=PATIENCE) == 1
    finally:
        job.kill()
    assert (tmp_path / "worker").read_text() == "saved\n"
    arguments = (tmp_path / "arguments").read_text()
    assert "--nproc-per-node 2" in arguments and "-m r1v3 grpo some.yaml --resume" in arguments
