"""A client of vLLM servers whose one server is a function."""

import re
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from r1v3.rollout.completions import Completion
from r1v3.rollout.contract import TokenRules
from r1v3.rollout.server_pool import Server, ServerLimits
from r1v3.rollout.vllm_protocol import Call
from r1v3.rollout.vllm_server import VLLMServers


class StandInServers(VLLMServers):
    """Sends nothing; completes `choice_rows` as it is told to.

    Args:
        say: texts of the completions of a row, which is named by the number in its question.

    Attributes:
        asked: how often each row was. under_way: requests now; most: at a time.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        concurrency: int,
        say: Callable[[str, int], Awaitable[list[str]]],
    ) -> None:
        limits = ServerLimits(concurrency=concurrency)
        super().__init__(["http://127.0.0.1:9"], TokenRules.of(tokenizer), folder, limits=limits)
        self.asked: Counter[str] = Counter()
        self.most = 0
        self._encode, self._say = tokenizer.encode, say
        self.under_way = 0

    async def _ask(self, server: Server, call: Call) -> list[Completion]:
        found = re.search(r"(\d+)\?", str(call.body["messages"]))
        assert found is not None
        self.asked[found[1]] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            texts = await self._say(found[1], call.count)
        finally:
            self.under_way -= 1
        rows = [(*self._encode(text), self.rules.stop_id) for text in texts]
        return [Completion(row, (0.0,) * len(row), True) for row in rows]

    async def _check(self, server: Server) -> None:
        pass
