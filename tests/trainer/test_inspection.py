"""Files for those who look into a run: traces of steps, and completions as Parquet."""

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from r1v3.config import GRPO, ConfigError, load
from r1v3.rewards import score
from r1v3.trainer.grpo import GRPOTrainer
from tests.tiny_run import home, write_configs

STEPS = 2


def trained(folder: Path, *overrides: str) -> GRPOTrainer:
    """A trainer that has taken two steps."""
    write_configs(folder)
    own = [
        f"run={folder / 'run'}",
        f"model={home() / 'base'}",
        f"steps={STEPS}",
        "decoding.max_tokens=12",
    ]
    made = GRPOTrainer(load(GRPO, folder / "configs/grpo.yaml", [*own, *overrides]), resuming=False)
    made.loop()
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return trained(tmp_path_factory.mktemp("plain"))


def assert_same_weights(one: GRPOTrainer, other: GRPOTrainer) -> None:
    mine, theirs = (dict(made.engine.model.named_parameters()) for made in (one, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_chosen_step_is_traced(tmp_path: Path, plain: GRPOTrainer) -> None:
    """Fails if a trace is of another step, cannot be opened, or changes what is learned."""
    made = trained(tmp_path, "profile.steps=[2]")
    folder = tmp_path / "run/profile/grpo"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-2.rank-0.json.gz", "step-2.rank-0.txt"]
    events = json.loads(gzip.decompress((folder / names[0]).read_bytes()))["traceEvents"]
    assert "aten::mm" in {event["name"] for event in events}
    assert "Self CPU" in (folder / names[1]).read_text()
    assert_same_weights(made, plain)


def test_only_chosen_ranks_trace(tmp_path: Path) -> None:
    """Fails if every rank of a large job writes a trace."""
    trained(tmp_path, "profile.steps=[1]", "profile.ranks=[8]")
    assert not (tmp_path / "run/profile").exists()


@pytest.mark.parametrize("setting", ["profile.steps=[0]", "dump_rollouts_every=0"])
def test_steps_count_from_one(tmp_path: Path, setting: str) -> None:
    write_configs(tmp_path)
    with pytest.raises(ConfigError, match="greater than 0"):
        load(GRPO, tmp_path / "configs/grpo.yaml", [setting])


def test_completions_are_dumped_as_they_were_rewarded(tmp_path: Path, plain: GRPOTrainer) -> None:
    """Fails if a row of the file holds another's reward, or tokens that are not its text's."""
    made = trained(tmp_path, "dump_rollouts_every=2")
    (file,) = (tmp_path / "run/rollouts/grpo").iterdir()
    assert file.name == "step-000002.parquet"
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == made.config.prompts_per_step * made.config.group_size
    for row in rows:
        sample = made.samples[row["row"]]
        assert (row["question"], row["ground_truth"]) == (sample.question, sample.ground_truth)
        (reward,) = score([row["response"]], [sample], weight=made.config.rewards.accuracy_weight)
        assert reward.total == row["reward"] and reward.extracted == row["extracted"]
        kept = row["response_ids"][: -1 if row["finished"] else None]
        assert made.engine.tokenizer.decode(kept) == row["response"]
        assert len(row["response_ids"]) == len(row["logprobs"]) == len(row["entropy"])
    for start in range(0, len(rows), made.config.group_size):
        group = rows[start : start + made.config.group_size]
        assert len({row["row"] for row in group}) == 1
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-4)
    assert_same_weights(made, plain)
