"""The model of a step on a cluster: its 1F1B schedule, and what it says of the presets."""

import json
from pathlib import Path

import pytest
from transformers import InternVLConfig

from benchmarks import cluster_step
from r1v3.config import GRPO, load
from r1v3.model.flops import Dimensions, Work, train_flops
from r1v3.plan.job import Cluster, job_of
from r1v3.plan.plan import make_plan
from r1v3.plan.schedule import simulate, stage_costs


def dims() -> Dimensions:
    return Dimensions.of(InternVLConfig.from_pretrained(cluster_step.PRESETS / "model"))


def preset(name: str) -> GRPO:
    return load(GRPO, cluster_step.PRESETS / f"{name}.yaml", [])


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_equal_micro_batches_take_the_known_time_of_1f1b(stages: int, count: int) -> None:
    """Fails if the simulated schedule is not 1F1B: (count + stages - 1) x one stage's time."""
    taken = simulate([[(1.0, 3.0)] * stages] * count)
    assert taken == pytest.approx((count + stages - 1) * 4.0)


def test_unequal_micro_batches_by_hand() -> None:
    """Fails if a stage starts what it has not been sent, or two things at a time."""
    # Stage 0: F0 0-1, F1 1-5, then B0; stage 1: F0 1-2, B0 2-4, F1 5-9, B1 9-17.
    costs = [[(1.0, 2.0), (1.0, 2.0)], [(4.0, 8.0), (4.0, 8.0)]]
    assert simulate(costs) == 17 + 8
    assert simulate([]) == 0.0


def test_stage_costs_are_the_operations_of_the_model() -> None:
    """Fails if the model of a step counts otherwise than telemetry and plan."""
    work = Work.of([3840], [100, 2000], 2100, 13)
    wanted = train_flops(dims(), work, cluster_step.MODULES, recompute=True)
    for layers in ((64,), (22, 42), (16, 16, 16, 16)):
        found = sum(f + b for f, b in stage_costs(dims(), work, layers, cluster_step.MODULES))
        assert found == pytest.approx(sum(wanted.values()))


@pytest.mark.parametrize(("gpus", "limit"), [(64, 1.25), (128, 1.30), (256, 1.45)])
def test_the_presets_keep_a_cluster_busy(gpus: int, limit: float) -> None:
    """Fails if micro-batches, their shares or their order leave GPUs waiting again."""
    before, after = (
        cluster_step.mean_step(preset("grpo_8k"), dims(), gpus, 4000, 4, way)
        for way in ("before", "after")
    )
    assert after.over_ideal <= limit < before.over_ideal
    assert 1 <= after.over_ideal and after.ideal == before.ideal


@pytest.mark.parametrize("name", ["grpo_4k", "grpo_16k"])
def test_the_plan_s_seconds_are_those_of_the_schedule(name: str) -> None:
    """Fails if the plan leaves out waiting, counts GPUs twice, or takes another replica's time."""
    for gpus in (32, 256):
        plan = make_plan(job_of(preset(name), dims(), Cluster(gpus)), dims())
        ideal = plan.hardware_flops / gpus / plan.job.cluster.flops
        assert ideal < plan.seconds < 1.2 * ideal
    alone = job_of(
        load(
            GRPO,
            cluster_step.PRESETS / "grpo_8k.yaml",
            [
                "parallel.pipeline=1",
                "parallel.first_stage_layers=null",
                "group_size=2",
                "prompts_per_step=8",
            ],
        ),
        dims(),
        Cluster(64),
    )
    plan = make_plan(alone, dims())
    assert plan.seconds == pytest.approx(plan.hardware_flops / 64 / 400e12)


@pytest.mark.parametrize("overrides", [(), ("parallel.first_stage_layers=22",)])
def test_the_plan_s_seconds_count_the_filling_of_the_pipeline(overrides: tuple[str, ...]) -> None:
    """Fails if the plan is more than 5 % from the time of 1F1B: one micro-batch through all stages,
    and the others at the pace of the slowest stage."""
    config = load(GRPO, cluster_step.PRESETS / "grpo_16k.yaml", overrides)
    for gpus in (64, 256):
        job = job_of(config, dims(), Cluster(gpus))
        rate = job.cluster.flops * job.shards.tensor
        pack = job.work * (1 / job.micro_batches)
        stages = stage_costs(dims(), pack, job.shards.layers, job.modules)
        each = [(forward + backward) / rate for forward, backward in stages]
        one_f_one_b = sum(each) + (job.micro_batches / job.data - 1) * max(each)
        assert make_plan(job, dims()).seconds == pytest.approx(one_f_one_b, rel=0.05)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the result does not say that it is a model, or leaves out what was assumed."""
    file = tmp_path / "cluster.json"
    assert cluster_step.main(["--steps", "1", "--json", str(file)]) == 0
    assert "not a GPU measurement" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "Not a measurement" in found["what"] and found["assumed_seconds"]
    assert len(found["training"]) == len(found["steps"]) == 12
    for one, row in zip(found["training"], found["steps"], strict=True):
        assert row["step"] > row["training"] == one["seconds"]
