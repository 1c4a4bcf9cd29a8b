"""Thought budgets on samplers that complete in requests: the tokens of local sampling."""

from collections.abc import Callable

import pytest
import torch

from r1v3.data.batch import Batch
from r1v3.rollout import local
from r1v3.rollout.completions import Completion, assemble, complete_thoughts
from r1v3.rollout.contract import Request, Rollout, Sampling, TokenRules
from r1v3.rollout.local import LocalSampler
from tests import tiny

WORDS = tiny.tokenizer()
RULES = TokenRules.of(WORDS)
LIMIT = 40
# What a model would write if nothing were forced; every position has its token.
TEXTS = {
    "one long thought": "5 " * 40,
    "closed in time": "5</think>\n\n" + "7 " * 40,
    "opened again": "5 6</think>7<think>" + "8 " * 40,
    "opened again at once": "</think><think>" + "9 " * 40,
    "opened behind the forced tag": "1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7<think>" + "8 " * 40,
    "opened and closed twice": "1</think>2<think>3</think>4<think>" + "5 " * 40,
    "writing the tag": "1 2 3 </think>" + "4 " * 40,
    "half a tag": "1 2 3 </thi 4 5 6 </th" + "7 " * 40,
    "tags in one word": "So 3. </think>\n\nIt is 3.</think><think>" + "7 " * 40,
    "opened near the end": "1</think>" + "2 " * 12 + "<think>" + "3 " * 40,
    "opening tag in a thought": "1<think>2<think>3" + "4 " * 40,
    "ended": "1 2</think>\n\n\\boxed{12}" + "<|im_end|>" + "9 " * 40,
    "ended in a second thought": "1</think><think>2 3 4 5 6 7 8 9<|im_end|>" + "9 " * 40,
    "three thoughts": "<think>1</think><think>2</think><think>" + "3 " * 40,
}


def script(text: str) -> list[int]:
    return list(WORDS.encode(text, add_special_tokens=False))[:LIMIT]


def written(ids: list[int]) -> Completion:
    """The completion that an engine returns of these tokens."""
    if RULES.stop_id in ids:
        ids = ids[: ids.index(RULES.stop_id) + 1]
    return Completion(tuple(ids), (0.0,) * len(ids), ids[-1:] == [RULES.stop_id])


class Silent:
    """A decoder without a model: what is drawn is scripted."""

    def prefill(self, prompts: Batch, group_size: int, capacity: int) -> torch.Tensor:
        return torch.zeros(1, RULES.size)

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, RULES.size)

    def select(self, rows: torch.Tensor) -> None:
        raise AssertionError("one row is never compacted")


@pytest.fixture
def locally(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int], Sampling], Rollout]:
    def sample(ids: list[int], sampling: Sampling) -> Rollout:
        monkeypatch.setattr(local, "sample_tokens", tiny.draws_of(ids))
        sampler = LocalSampler(Silent(), RULES)
        request = Request(tiny.an_example(0), tiny.some_questions(1)[0])
        return sampler.complete([request], sampling, generator=torch.Generator())

    return sample


@pytest.mark.parametrize("budget", [0, 1, 4, 9, LIMIT - 3])
@pytest.mark.parametrize("name", TEXTS)
def test_requests_give_the_tokens_of_local_sampling(
    name: str, budget: int, locally: Callable[[list[int], Sampling], Rollout]
) -> None:
    """Fails if a re-opened thought has no budget on vLLM, a tag is cut or forced into another, or a
    forced token is taken for a sampled one."""
    ids, sampling = script(TEXTS[name]), Sampling(1.0, LIMIT, (), budget)
    wanted = locally(ids, sampling)
    asked: list[int] = []

    def go_on(rows: dict[int, Completion], calls: int) -> list[Completion]:
        assert calls == len(asked)
        asked.append(len(rows))
        return [written(ids[len(begun.token_ids) :]) for begun in rows.values()]

    first = written(ids[:budget]) if budget else Completion()
    found = assemble(complete_thoughts([first], sampling, RULES, go_on), RULES.pad_id)
    for field in ("response_ids", "mask", "sampled", "finished"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field
    assert len(asked) <= 12


def test_rows_are_continued_together_and_only_where_they_must() -> None:
    """Fails if one row's second thought makes another row's tokens, or asks for it again."""
    texts = [
        TEXTS[name] for name in ("one long thought", "ended", "opened again", "closed in time")
    ]
    scripts, sampling = [script(text) for text in texts], Sampling(1.0, LIMIT, (), 4)
    alone, together = [], []

    def continuing(numbers: list[int], log: list[list[int]]) -> Callable[..., list[Completion]]:
        def go_on(rows: dict[int, Completion], calls: int) -> list[Completion]:
            log.append(list(rows))
            return [written(scripts[numbers[i]][len(b.token_ids) :]) for i, b in rows.items()]

        return go_on

    for n, ids in enumerate(scripts):
        alone += complete_thoughts([written(ids[:4])], sampling, RULES, continuing([n], []))
    log: list[list[int]] = []
    together = complete_thoughts(
        [written(ids[:4]) for ids in scripts], sampling, RULES, continuing([0, 1, 2, 3], log)
    )
    assert together == alone
    assert log[0] == [0, 1, 2, 3] and log[1] == [2] and all(rows == [2] for rows in log[1:])
