"""20,000 rows of five samples by a stand-in engine: what all benchmarks together are."""

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1v3.data.tokenizer import load_tokenizer
from r1v3.evaluation import policy
from r1v3.http import RequestFailed
from r1v3.rollout.batches import Batched
from r1v3.rollout.contract import Request, Rollout
from r1v3.rollout.copies import ONE_COPY
from r1v3.rollout.server_pool import NoServers
from tests.suite.files import encoded, write_tsv
from tests.suite.servers import StandInServers
from tests.suite.test_run import config, run_suite, score_suite

ROWS, SAMPLES, BATCH = 20_000, 5, 500
THOUGHT = "Let me look at the picture again. Wait, 3 + 4 is 7, so the second one fits. " * 3


class StandIn(Batched):
    """A sampler that says the same to every row, for a right answer or a wrong one."""

    copies = ONE_COPY

    def __init__(self, encode: Callable[[str], list[int]], stop_id: int) -> None:
        self._said = [
            encode(f"{THOUGHT}\n</think>\n\n\\boxed{{{letter}}}") + [stop_id] for letter in "AB"
        ]
        self.rules = SimpleNamespace(pad_id=stop_id)
        self.asked: Counter[str] = Counter()
        self.most: list[int] = []  # resident memory so far, in KiB, after every batch
        self.stop_after: int | None = None

    def complete(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> Rollout:
        if len(self.most) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.update(str(request.sample.index) for request in requests)
        self.most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        rows = len(requests) * SAMPLES
        ids = torch.tensor([self._said[i % SAMPLES < 2] for i in range(rows)])
        mask, zeros = torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)
        return Rollout(ids, mask, zeros, zeros, mask, torch.ones(rows, dtype=torch.bool))

    def close(self) -> None:
        pass


def write_rows(folder: Path) -> dict[str, Any]:
    """Write the file; return the settings of the suite."""
    shown = encoded(0)
    rows = [
        {"index": str(i), "image": shown, "question": f"Which one is {i}?", "A": "6", "B": "7",
         "C": "8", "D": "9", "answer": "AB"[i % 2], "category": str(i % 7)}
        for i in range(ROWS)
    ]  # fmt: skip
    write_tsv(folder / "data" / "MMStar.tsv", rows)
    return {
        "benchmarks": ["mmstar"], "samples": SAMPLES, "batch_prompts": BATCH, "max_tiles": 1,
        "cuts": [10],
    }  # fmt: skip


@pytest.mark.slow
def test_twenty_thousand_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if memory grows with the number of answers, if a resumed run asks again or skips, or
    if scoring 100,000 answers takes a minute."""
    settings = write_rows(tmp_path)
    found: list[StandIn] = []

    def build(rollout: Any, config: Any, tokenizer: Any, **kwargs: Any) -> StandIn:
        if not found:
            found.append(StandIn(tokenizer.encode, tokenizer.convert_tokens_to_ids("<|im_end|>")))
        return found[0]

    monkeypatch.setattr(policy, "build_sampler", build)
    with pytest.raises(KeyboardInterrupt):
        build(None, None, load_tokenizer(config(tmp_path, **settings).model)).stop_after = 13
        run_suite(config(tmp_path, **settings))
    assert sum(found[0].asked.values()) == 13 * BATCH
    found[0].stop_after = None
    record = run_suite(config(tmp_path, **settings))
    assert len(found[0].asked) == ROWS and set(found[0].asked.values()) == {1}
    most = found[0].most
    assert most[-1] - most[len(most) // 3] < 64 << 10, most
    begun = time.process_time()
    again = score_suite(config(tmp_path, **settings))
    assert time.process_time() - begun < 60
    score = again.scores["mmstar"]["slow"]
    assert score == record.scores["mmstar"]["slow"]
    assert score.score.value == pytest.approx(0.5) and score.questions == ROWS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most[-1] < 512 << 10


@pytest.mark.slow
def test_twenty_thousand_rows_of_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if memory grows with the answers that come one by one, if more requests are under way
    than allowed, or if a resumed run skips a row or asks again what was kept."""
    settings, most, limit = write_rows(tmp_path), list[int](), 64
    found: list[StandInServers] = []
    fails_at: int | None = 13 * BATCH

    async def say(row: str, count: int) -> list[str]:
        asked = found[0].asked.total()
        if asked == fails_at:
            raise RequestFailed("out of order", retry=False)
        if asked % BATCH == 0:
            most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        await asyncio.sleep(0)
        return [f"{THOUGHT}\n</think>\n\n\\boxed{{{'AB'[k >= 2]}}}" for k in range(count)]

    def build(rollout: Any, config: Any, tokenizer: Any, **kwargs: Any) -> StandInServers:
        if not found:
            found.append(StandInServers(config.model, tokenizer, limit, say))
        return found[0]

    monkeypatch.setattr(policy, "build_sampler", build)
    with pytest.raises(NoServers, match="out of order"):
        run_suite(config(tmp_path, **settings))
    fails_at = None
    record = run_suite(config(tmp_path, **settings))
    again = sum(found[0].asked.values()) - ROWS
    assert len(found[0].asked) == ROWS and 1 <= again <= limit and found[0].most <= limit
    assert most[-1] - most[len(most) // 3] < 64 << 10, most
    score = record.scores["mmstar"]["slow"]
    assert score.score.value == pytest.approx(0.5) and score.questions == ROWS
