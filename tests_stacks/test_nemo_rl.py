"""NeMo-RL's own heads and losses, from its source, against r1v3's."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from .comparing import assert_close, assert_same, results
from .trainers import nemo_rl

model_utils = nemo_rl()
from nemo_rl.algorithms.loss import utils as loss_utils  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import (  # noqa: E402
    ClippedPGLossConfig,
    ClippedPGLossFn,
)

from r1v3.integrations.nemo_rl import next_token_logprobs, use_head  # noqa: E402
from r1v3.kernels import grpo_loss  # noqa: E402

ROWS, LENGTH, VOCABULARY = 3, 8, 300


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process; what NeMo-RL moves to the GPU stays where it is."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def logprobs(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    return [
        model_utils.from_parallel_logits_to_logprobs(
            logits, target, 0, VOCABULARY, dist.group.WORLD, **options
        )
    ]


def packed(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    return [
        model_utils.from_parallel_logits_to_logprobs_packed_sequences(
            logits.reshape(1, -1, VOCABULARY), target.reshape(1, -1),
            torch.tensor([0, 9, 10, ROWS * LENGTH]), 15, 0, VOCABULARY, dist.group.WORLD, **options,
        )
    ]  # fmt: skip


def entropy(logits: torch.Tensor, target: torch.Tensor, **_: Any) -> list[torch.Tensor]:
    return [model_utils.ChunkedDistributedEntropy.apply(logits, 3, dist.group.WORLD, False)]


def unsharded(logits: torch.Tensor, target: torch.Tensor, **_: Any) -> list[torch.Tensor]:
    return [loss_utils.get_next_token_logprobs_from_logits(target, logits)]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("function", [logprobs, packed, entropy, unsharded])
def test_heads_equal_stock(function: Callable[..., Any], chunk: int | None) -> None:
    """Fails if a log-probability, entropy or gradient of NeMo-RL changes with r1v3's head."""
    target = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    logits = torch.randn(ROWS, LENGTH, VOCABULARY) * 3

    def run(leaf: torch.Tensor) -> list[torch.Tensor]:
        return function(leaf, target, chunk_size=chunk)

    wanted = results(run, logits)
    with use_head() as rebound:
        assert len(rebound.names) == 6
        assert_close(wanted, results(run, logits))


def test_hidden_states_equal_stock() -> None:
    """Fails if the head that never makes logits has other values or gradients."""
    hidden, weight = torch.randn(LENGTH, ROWS, 16), torch.randn(VOCABULARY, 16)
    target = torch.randint(0, VOCABULARY, (ROWS, LENGTH))

    def run(*leaves: torch.Tensor) -> list[torch.Tensor]:
        return [
            model_utils.from_parallel_hidden_states_to_logprobs(
                *leaves, False, target, 0, VOCABULARY, dist.group.WORLD, chunk_size=3
            )
        ]

    wanted = results(run, hidden, weight)
    with use_head():
        assert_close(wanted, results(run, hidden, weight))


@pytest.mark.parametrize("chunk", [None, 3])
def test_no_graph_is_kept_for_inference(chunk: int | None) -> None:
    """Fails if the old policy's log-probabilities keep their logits alive."""
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, requires_grad=True)
    target = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    with use_head():
        (found,) = logprobs(logits, target, chunk_size=chunk, inference_only=True)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_params": SimpleNamespace(top_k=5, top_p=1.0)},
        {"sampling_params": SimpleNamespace(top_k=None, top_p=0.9)},
        {"vocab_parallel_group": "group", "vocab_parallel_rank": 1, "chunk_size": 4},
    ],
    ids=["top-k", "top-p", "sharded"],
)
def test_what_r1v3_does_not_compute_goes_to_stock(options: dict[str, Any]) -> None:
    """Fails if a filter of the sampler is dropped, or a shard read as the whole."""
    compute = next_token_logprobs(lambda *arguments, **options: options)
    found = compute(torch.zeros(1, 2), torch.zeros(1, 2, 3), **options)
    assert {name: value for name, value in found.items() if value is not None} == options


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "per token": ({}, {}),
    "per sequence": ({"token_level_loss": False}, {"aggregation": "sequence-mean"}),
    "dual clip": ({"ratio_clip_c": 3.0}, {"dual_clip": 3.0}),
    "cispo": ({"use_cispo": True}, {"ratio_clip": "cispo"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("corrected", [False, True])
def test_grpo_loss_is_nemo_rls(case: str, corrected: bool) -> None:
    """Fails if the aggregation that the documentation names for NeMo-RL is not its."""
    settings, options = CASES[case]
    token_mask, sample_mask = torch.ones(4, LENGTH), torch.tensor([1.0, 1, 1, 0])
    token_mask[:, :3] = token_mask[1, 6:] = 0
    previous, advantages = -torch.rand(4, LENGTH), torch.randn(4, 1).expand(4, LENGTH)
    sampled = previous + torch.randn(4, LENGTH) * 0.3
    data = {
        "input_ids": torch.zeros(4, LENGTH), "advantages": advantages, "prev_logprobs": previous,
        "generation_logprobs": sampled, "token_mask": token_mask, "sample_mask": sample_mask,
    }  # fmt: skip
    tis = {
        "use_importance_sampling_correction": True, "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.2,
    }  # fmt: skip
    config = ClippedPGLossConfig(
        ratio_clip_min=0.2, ratio_clip_max=0.28, reference_policy_kl_penalty=0.0, **settings,
        **(tis if corrected else {}),
    )  # fmt: skip
    stock = ClippedPGLossFn(config)
    sequences, tokens = torch.tensor(7.0), torch.tensor(50.0)
    weights = (previous - sampled).exp().clamp(max=1.2)[:, 1:] if corrected else None
    per_token = stock.loss_type.name == "TOKEN_LEVEL"

    def theirs(current: torch.Tensor) -> list[torch.Tensor]:
        return [stock(current, data, sequences, tokens)[0]]

    def ours(current: torch.Tensor) -> list[torch.Tensor]:
        loss, _ = grpo_loss(
            current, previous[:, 1:], advantages[:, 1:], token_mask[:, 1:] * sample_mask[:, None],
            clip_low=0.2, clip_high=0.28, weights=weights,
            normalizer=tokens if per_token else sequences,
            **{"aggregation": "token-mean", **options},
        )  # fmt: skip
        return [loss]

    assert_same(theirs, ours, previous[:, 1:] + torch.randn(4, LENGTH - 1) * 0.4)
