"""`r1v3 plan`: real modules of the 38B on the meta device, and what is said about them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import InternVLConfig
from typer.testing import CliRunner

from r1v3.cli import app
from r1v3.config import GRPO, SFT, load
from r1v3.data.tiles import KEPT_BYTES
from r1v3.model.flops import Dimensions
from r1v3.model.internvl import count_parameters
from r1v3.plan import memory
from r1v3.plan.host import PROCESS, HostPlan, Kept
from r1v3.plan.job import Cluster, job_of, model_folder, stage_layers
from r1v3.plan.plan import make_plan
from r1v3.plan.run import stage_kind, stored_parameters
from r1v3.plan.search import balanced_first
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "r1v3-38b"
GRPO_FILE = CONFIGS / "grpo_4k.yaml"


def dims() -> Dimensions:
    return Dimensions.of(InternVLConfig.from_pretrained(CONFIGS / "model"))


def test_the_38b_on_128_gpus(tmp_path: Path) -> None:
    """Fails if the plan counts other parameters than the checkpoint has, or the formulas that
    the search uses differ from the modules that are built."""
    file = tmp_path / "plan.json"
    done = CliRunner().invoke(
        app, ["plan", str(GRPO_FILE), "--gpus", "128", "--json", str(file)], env={"COLUMNS": "100"}
    )
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["total_parameters"] == 38_388_164_992
    assert found["parameters"] == dims().parameters()
    job = job_of(load(GRPO, GRPO_FILE), dims(), Cluster(128))
    formula = [memory.stage_parameters(dims(), job.shards, stage) for stage in range(2)]
    assert [rank["parameters"] for rank in found["ranks"]] == formula
    held = sum(sum(count.values()) for count in formula) * 8
    # What is not split stands on all 8 ranks; the rest beyond the checkpoint is padding.
    whole = dims().vision_embeddings + 45 * 6 * 3200 + 2 * 12800 + 5120 + (64 * 2 + 1) * 5120
    assert held == found["total_parameters"] + found["padding"] + 7 * whole
    assert "38,388,164,992" in done.output and "fits" in done.output
    assert "stage 0" in done.output and "64 x 30" in done.output


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_built() -> None:
    """Fails if an impossible layout, or sequences that the model has no positions for, end in a
    traceback, in advice to buy GPUs, or take a minute to be named."""
    for arguments, message in (
        (["--gpus", "24"], "24 GPUs are not a multiple of tensor 8 x pipeline 2 = 16"),
        (["engine=hf", "dtype=float32", "parallel={}"], "the plan needs engine=megatron"),
        (["parallel.first_stage_layers=64"], "0 layers are left for 1 stages"),
        (["--sequence-length", "2000"], "a prompt of 13 tiles and 512 words has 3840 tokens"),
        (["decoding.max_tokens=32768"], "a sequence of 36,608 tokens, 3,840 of them the prompt"),
        (["--stage", "pretrain"], "stage 'pretrain' is not one of sft, grpo, connector, eval"),
    ):
        gpus = [] if "--gpus" in arguments else ["--gpus", "64"]
        done = CliRunner().invoke(app, ["plan", str(GRPO_FILE), *gpus, *arguments])
        assert done.exit_code == 1 and message in done.output


def test_layers_of_the_stages() -> None:
    """Fails if layers get lost, or a stage is left without one."""
    assert stage_layers(64, 1, None, None) == (64,)
    assert stage_layers(64, 4, None, None) == (16,) * 4
    assert stage_layers(64, 4, 7, None) == (7, 19, 19, 19)
    assert stage_layers(64, 4, 6, 20) == (6, 19, 19, 20)
    assert stage_layers(64, 2, 26, 38) == (26, 38)
    for stages, first, last in ((4, 6, None), (2, 26, 26), (3, None, 63), (3, 40, 30)):
        with pytest.raises(ValueError, match="64 language layers cannot be"):
            stage_layers(64, stages, first, last)
    for stages in (2, 4, 8):
        layers = stage_layers(64, stages, balanced_first(dims(), stages), None)
        assert sum(layers) == 64


def changed(**changes: Any) -> float:
    """Bytes of the fullest rank of the 8k preset, its groups undivided, under other settings."""
    changes = {"micro_batch_tokens": "null"} | changes
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    config = load(GRPO, CONFIGS / "grpo_8k.yaml", overrides)
    plan = make_plan(job_of(config, dims(), Cluster(64)), dims())
    return max(rank.training for rank in plan.ranks)


def test_settings_move_memory_the_way_they_should() -> None:
    """Fails if the plan is blind to a setting that a user would turn."""
    base = changed()
    assert changed(parallel__recompute="none") > base
    assert changed(parallel__sequence="false") > base
    assert changed(decoding__max_tokens=4096) < base
    assert changed(micro_batch_prompts=2) > base
    assert changed(micro_batch_tokens=131072) < base
    assert changed(micro_batch_tokens=32768) < changed(micro_batch_tokens=65536)
    budget = changed(micro_batch_tokens=65536)
    assert changed(micro_batch_tokens=65536, micro_batch_prompts=2) > budget
    assert changed(parallel__distributed_optimizer="false") > base
    assert changed(modules__llm="false") < base
    assert changed(loss__kl_coef=0.1) > base
    assert changed(max_tiles=6) < base


def test_rollouts_need_room_for_weights_and_one_sequence() -> None:
    """Fails if a share too small for vLLM's weights is called fine, or servers are charged."""

    def plan(*overrides: str) -> Any:
        config = load(GRPO, GRPO_FILE, overrides)
        return make_plan(job_of(config, dims(), Cluster(64)), dims())

    small = plan("rollout.memory_share=0.15")
    assert any("holds no sequence" in problem for problem in small.problems)
    alone = plan("rollout.engine=vllm-server", "rollout.urls=[http://a:8000]")
    assert alone.fits and alone.ranks[0].sampling == alone.ranks[0].resident
    local = plan("rollout.engine=local", "decoding.max_tokens=8192").ranks[0].rollout
    # 8 prompts of a replica x 32 rows, 12,032 tokens, 30 layers, 1 of 8 heads, keys and values.
    assert local is not None and local.cache == 256 * 12032 * 30 * 128 * 2 * 2


@pytest.mark.parametrize(
    ("tensor", "refused"),
    [
        (4, []),
        (16, ["40 attention heads"]),
        (3, ["64 GPUs are no multiple of 3", "40 attention heads", "8 key and value heads"]),
        (10, ["no multiple of 10", "27,648 columns of an MLP", "8 key and value heads"]),
    ],
)
def test_what_vllm_refuses_does_not_fit(tensor: int, refused: list[str]) -> None:
    """Fails if a job that vLLM ends at its start is called fine, or a possible one is refused."""
    config = load(GRPO, GRPO_FILE, [f"rollout.tensor={tensor}"])
    plan = make_plan(job_of(config, dims(), Cluster(64)), dims())
    assert len(plan.problems) == len(refused)
    for problem, told in zip(plan.problems, refused, strict=True):
        assert told in problem


def test_the_host_and_the_disk_are_counted() -> None:
    """Fails if a plan leaves out the copy of a checkpoint, a folder that stays, or counts twice."""

    def host(*overrides: str, gpus: int = 64) -> tuple[HostPlan, Kept]:
        job = job_of(load(GRPO, GRPO_FILE, overrides), dims(), Cluster(gpus))
        return make_plan(job, dims()).host, job.kept

    total = sum(dims().parameters().values())
    found, kept = host("steps=100", "checkpoint_every=10", "keep=2")
    # bfloat16 weights; main parameters and two moments in float32.
    assert (found.model, found.checkpoint) == (2 * total, 14 * total)
    assert kept == Kept(checkpoints=3, models=9)
    assert found.disk == 3 * found.checkpoint + 9 * found.model
    # All ranks of all nodes together copy a checkpoint once; the first stage is the fuller one.
    assert found.checkpoint <= 8 * found.copy < 1.15 * found.checkpoint
    assert found.node - found.copy == 8 * (PROCESS + KEPT_BYTES)
    assert host(gpus=128)[0].copy == pytest.approx(host()[0].copy / 2, rel=0.01)
    assert host("steps=10", "checkpoint_every=10")[1] == Kept(1, 1)
    assert host("steps=100", "checkpoint_every=10", "keep_models=1")[1] == Kept(3, 2)
    assert host("parallel.distributed_optimizer=false")[0].copy > 3 * found.copy


def test_the_model_is_described_by_its_folder_or_beside_the_configuration(tmp_path: Path) -> None:
    """Fails if a plan of a downloaded model is made from another model's config.json."""
    folder = tiny.save(tmp_path / "own")
    config = load(SFT, CONFIGS / "sft.yaml", [f"model={folder}"])
    assert model_folder(config, CONFIGS / "sft.yaml") == folder
    assert stored_parameters(folder) == sum(count_parameters(tiny.model()).values())
    assert stored_parameters(CONFIGS / "model") is None
    with pytest.raises(ValueError, match="neither"):
        model_folder(load(SFT, CONFIGS / "sft.yaml"), tmp_path / "sft.yaml")
    assert stage_kind(Path("grpo_8k.yaml"), None) is GRPO
    assert stage_kind(Path("mine.yaml"), "sft") is SFT
