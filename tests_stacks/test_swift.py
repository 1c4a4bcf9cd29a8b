"""ms-swift's own heads, from its wheel, against r1v3's."""

import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from .comparing import assert_close, function_of, imported_by, results
from .trainers import swift_megatron

vocab_parallel_utils = swift_megatron()

from r1v3.integrations import swift as adapter  # noqa: E402
from r1v3.integrations.swift import AnswerReward, register_reward, use_head  # noqa: E402

TRAINERS = "swift/rlhf_trainers/"
VOCABULARY = 300


def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The definition in TRL, of one label or of several for each row."""
    if index.dim() == logits.dim():
        return F.log_softmax(logits, -1).gather(-1, index)
    return F.log_softmax(logits, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


@pytest.fixture()
def trainers(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The trainers' modules, which need all of TRL, with the names that they look up."""
    entropy = function_of("ms-swift", TRAINERS + "utils.py", "entropy_from_logits")
    modules = {}
    for name in ("grpo_trainer", "rlhf_mixin"):
        module = ModuleType(f"swift.rlhf_trainers.{name}")
        module.selective_log_softmax = selective_log_softmax  # type: ignore[attr-defined]
        modules[name] = module
        monkeypatch.setitem(sys.modules, module.__name__, module)
    modules["grpo_trainer"].entropy_from_logits = entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift.rlhf_trainers", ModuleType("swift.rlhf_trainers"))
    return modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (21,)])
def test_heads_equal_stock(
    shape: tuple[int, ...], dtype: torch.dtype, trainers: dict[str, ModuleType]
) -> None:
    """Fails if padded or packed rows have other log-probabilities, entropies or gradients."""
    labels = torch.randint(0, VOCABULARY, shape)
    logits = (torch.randn(*shape, VOCABULARY) * 3).to(dtype)

    def run(leaf: torch.Tensor) -> list[torch.Tensor]:
        own = trainers["grpo_trainer"]
        mixin = trainers["rlhf_mixin"].selective_log_softmax(leaf, labels)
        return [own.selective_log_softmax(leaf, labels), mixin, own.entropy_from_logits(leaf)]

    wanted = results(run, logits.double())
    with use_head() as rebound:
        assert len(rebound.names) == 3
        assert_close(wanted, results(run, logits), 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_several_labels_of_a_row_equal_stock(trainers: dict[str, ModuleType]) -> None:
    """Fails if distillation's top-k log-probabilities, or their gradient, are not TRL's."""
    logits, index = torch.randn(3, 7, 20), torch.randint(0, 20, (3, 7, 4))

    def run(leaf: torch.Tensor) -> list[torch.Tensor]:
        return [trainers["grpo_trainer"].selective_log_softmax(leaf, index)]

    wanted = results(run, logits)
    with use_head():
        assert_close(wanted, results(run, logits))


def test_the_trainers_look_these_names_up() -> None:
    """Fails if a trainer of this version no longer imports what is rebound in it."""
    grpo, mixin = (
        imported_by("ms-swift", TRAINERS + f"{n}.py") for n in ("grpo_trainer", "rlhf_mixin")
    )
    assert {"selective_log_softmax", "entropy_from_logits"} <= grpo
    assert "selective_log_softmax" in mixin
    megatron = imported_by("ms-swift", "swift/megatron/trainers/grpo_trainer.py")
    assert "compute_logps_and_entropy_from_logits" in megatron


@pytest.mark.parametrize("entropy", [False, True])
def test_megatron_heads_equal_stock(entropy: bool, one_rank: None) -> None:
    """Fails if a masked label is scored, or a value or gradient changes with r1v3's head."""
    labels = torch.randint(0, VOCABULARY, (2, 9))
    labels[0, 4:] = labels[1, :2] = -100

    def run(leaf: torch.Tensor) -> Any:
        function = vocab_parallel_utils.compute_logps_and_entropy_from_logits
        logprobs, spread = function(leaf, labels, compute_entropy=entropy)
        # Of masked tokens, which no loss counts, r1v3's entropy has no gradient.
        return [logprobs, spread if spread is None else spread * (labels != -100)]

    logits = torch.randn(2, 9, VOCABULARY) * 3
    wanted = results(run, logits)
    with use_head(megatron=True) as rebound:
        assert len(rebound.names) == 2
        assert (
            vocab_parallel_utils.compute_logps_and_entropy_from_logits is adapter.sharded_logprobs
        )
        assert_close(wanted, results(run, logits))


def test_the_example(trainers: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the file for --external_plugins rebinds or registers what ms-swift does not have."""
    rewards = ModuleType("swift.rewards")
    rewards.orms = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    file = Path(__file__).resolve().parent.parent / "examples" / "swift_heads.py"
    rebound = runpy.run_path(str(file))["rebound"]
    rebound.undo()
    assert len(rebound.names) == 3 and list(rewards.orms) == ["r1v3"]


def test_reward_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if ms-swift cannot make the reward by its name, or call it."""
    rewards = ModuleType("swift.rewards")
    rewards.orms = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    register_reward()
    reward = rewards.orms["r1v3"](args=None)
    assert isinstance(reward, AnswerReward)
    texts = ["3+4=7</think>\n\n\\boxed{7}", "\\boxed{7}", "3+4=8</think>\n\n\\boxed{8}"]
    found = reward(texts, solution=["7"] * 3, trainer_state=None)
    assert found == pytest.approx([1.0, 0.8, 0.2])
