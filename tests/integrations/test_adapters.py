"""The parts of the adapters that need no other stack."""

import sys
from typing import Any

import pytest
import torch

from r1v3.integrations import trl, verl, vllm

ABSENT = {
    "trl": lambda: trl.use_head(),
    "verl": lambda: verl.use_heads(),
    "verl, Megatron": lambda: verl.use_heads(megatron=True),
    "verl's registries": lambda: verl.register(),
    "vllm": lambda: vllm.NoWait,
}


@pytest.mark.parametrize("stack", ABSENT)
def test_a_stack_that_is_not_there_is_named(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an adapter imports its stack before it is used, or hides that it is missing."""

    class Absent:
        """A finder that knows that these are not installed."""

        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name in ("trl", "verl", "vllm"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=stack.split("'")[0].split(",")[0]):
        ABSENT[stack]()


@pytest.mark.parametrize("name", ["Nowait", "NoWait2", "thoughtbudget", "LogitsProcessor"])
def test_other_names_of_the_vllm_adapter_are_attribute_errors(name: str) -> None:
    """Fails if a misspelled class path gives another error than any module would."""
    with pytest.raises(AttributeError, match=name):
        getattr(vllm, name)


@pytest.mark.parametrize(
    ("mode", "counts", "wanted"),
    [
        ("token-mean", {}, ("token-mean", 5)),
        ("token-mean", {"batch_num_tokens": 50, "dp_size": 4}, ("token-mean", 12.5)),
        ("token-sum", {}, ("constant", 1)),
        ("token-sum", {"dp_size": 4}, ("constant", 0.25)),
        ("seq-mean-token-mean", {}, ("sequence-mean", 2)),
        ("seq-mean-token-mean", {"global_batch_size": 8, "dp_size": 2}, ("sequence-mean", 4)),
        ("seq-mean-token-sum", {}, ("sequence-sum", 2)),
        ("seq-mean-token-sum", {"global_batch_size": 8, "dp_size": 2}, ("sequence-sum", 4)),
        ("seq-mean-token-sum-norm", {}, ("sequence-sum", 2 * 4)),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 100}, ("sequence-sum", 2 * 100)),
        (
            "seq-mean-token-sum-norm",
            {"global_batch_size": 8, "dp_size": 2, "loss_scale_factor": 10},
            ("sequence-sum", 40),
        ),
    ],
)
def test_normalizers_of_verl(mode: str, counts: dict[str, Any], wanted: tuple[str, float]) -> None:
    """Fails if a loss_agg_mode of verl is divided by another count."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    aggregation, normalizer = verl.normalizer_of(mode, mask, **counts)
    assert (aggregation, float(normalizer)) == wanted


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
def test_normalizers_without_their_counts_are_errors(mode: str) -> None:
    """Fails if one rank's count silently stands for that of all, or a name is not known."""
    with pytest.raises(ValueError, match=mode):
        verl.normalizer_of(mode, torch.ones(2, 3), dp_size=2 if mode != "sum" else 1)


class Update:
    """As vLLM's BatchUpdate."""

    def __init__(self, removed: Any = (), added: Any = (), moved: Any = ()) -> None:
        self.removed, self.added, self.moved = removed, added, moved


class How:
    """As vLLM's MoveDirectionality."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_rows_follow_random_moves() -> None:
    """Fails if after any sequence of updates a request's state is at another row than it."""
    generator = torch.Generator().manual_seed(0)

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    rows: vllm.Rows[str] = vllm.Rows(lambda params, output: params)
    truth: dict[int, str] = {}
    for step in range(300):
        kind = pick(5)
        a, b = pick(6), pick(6)
        if kind == 0:
            rows.update(Update(removed=[a]))
            truth.pop(a, None)
        elif kind == 1:
            rows.update(Update(added=[(a, f"request {step}", [], [])]))
            truth[a] = f"request {step}"
        elif kind == 2:
            rows.update(Update(added=[(a, None, [], [])]))
            truth.pop(a, None)
        elif a != b:
            swap = kind == 3
            rows.update(Update(moved=[(a, b, How("SWAP" if swap else "UNIDIRECTIONAL"))]))
            first, second = truth.pop(a, None), truth.pop(b, None)
            if first is not None:
                truth[b] = first
            if swap and second is not None:
                truth[a] = second
        rows.update(None)
        assert rows.states == truth
