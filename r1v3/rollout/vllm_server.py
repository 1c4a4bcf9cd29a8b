"""Rollouts from vLLM servers over their OpenAI-compatible API.

The first process of a job talks to the servers and sends the outcome to the others; the engines
run elsewhere, so nothing here imports vLLM.
Start each server on the folder that the trainer publishes its weights to:

    VLLM_SERVER_DEV_MODE=1 vllm serve WEIGHTS/current --logprobs-mode processed_logprobs

The development mode has the endpoints that change weights; they can run anything on the server,
so keep its port inside the cluster. `vllm_protocol` describes the requests, `server_pool` the
choice of servers, retries and time limits.

Weights go over the file system: a model folder is written, the link `current` is moved to it, and
each server is told to load what it was started on (`/pause`, `/collective_rpc` with
`reload_weights`, `/reset_prefix_cache`, `/resume`; documented with vLLM's sleep mode and its
reinforcement-learning endpoints). It needs nothing in common but a file system, and a server that
restarts comes up with the current weights by itself. vLLM can also take weights over NCCL; that
interface changed between 0.18, 0.29 and 0.32 and needs vLLM in the trainer, so it is not used.
tests_stacks runs sampling in every mode, thought budgets over pictures, the suite and GRPO against
vLLM 0.32 on a CPU (V1 model runner): greedy tokens are those of local sampling. Other tests use a
server that speaks its protocol.
"""

import asyncio
import json
from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from r1v3.http import (
    CLIENT_OPTIONS,
    IDENTITY,
    RequestFailed,
    check_address,
    exchange,
    require_httpx,
)
from r1v3.ranks import ALONE, Ranks
from r1v3.rollout.completions import Completion, assemble, close_thought
from r1v3.rollout.contract import Request, Rollout, Sampling, TokenRules, nothing
from r1v3.rollout.copies import Copies
from r1v3.rollout.exchange import exchange_rows
from r1v3.rollout.server_pool import DEFAULT_LIMITS, Pool, Server, ServerLimits, as_they_come
from r1v3.rollout.vllm_protocol import (
    Call,
    chat_call,
    check_sampling,
    completion_call,
    placeholder_of,
    probe_call,
    read_answer,
    read_probe,
)
from r1v3.rollout.weights import publish

if TYPE_CHECKING:
    import httpx

_CHECK_SECONDS, _CHECK_BYTES = 30.0, 1 << 20
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Prompt:
    """One prompt on its way.

    Attributes:
        ids: of its tokens.
        call: the first request.
        seeds: of the further requests that close its thoughts, one for each completion.
    """

    ids: tuple[int, ...]
    call: Call
    seeds: Sequence[int]


class VLLMServers:
    """A `contract.Sampler` over vLLM servers.

    Args:
        urls: of the servers; a trailing `/v1` is dropped.
        rules: of the tokenizer of the model they serve.
        model_folder: the model in the layout that the servers serve; the configuration and the
            tokenizer of published weights are copied from it.
        weights_folder: where weights are published; None for servers whose weights stay.
        ranks: processes that make every call together; the first one talks to the servers.
        dtype: of published weights; None leaves theirs.
        max_tiles: most tiles of a picture in a request that names none, where that is not the
            number of the model folder.

    Raises:
        ValueError: no URL, or one that is not an http address.
        ImportError: httpx is not installed.
    """

    def __init__(
        self,
        urls: Sequence[str],
        rules: TokenRules,
        model_folder: Path,
        *,
        weights_folder: Path | None = None,
        ranks: Ranks = ALONE,
        dtype: torch.dtype | None = None,
        limits: ServerLimits = DEFAULT_LIMITS,
        max_tiles: int | None = None,
    ) -> None:
        if not urls:
            raise ValueError("urls () must name at least one server")
        for url in urls:
            check_address("urls", url)
        require_httpx("sampling from vLLM servers")
        plain = dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in urls)
        self.servers = [Server(url) for url in plain]
        self.rules = rules
        self.ranks = ranks
        # Prompts are answered on the first rank; every rank gets a part of them.
        self.copies = Copies(tuple(range(ranks.size)), ranks)
        self.step: int | None = None
        self._model_folder, self._weights_folder = model_folder, weights_folder
        self._placeholder = placeholder_of(model_folder)
        self._dtype, self._max_tiles = dtype, max_tiles
        self._limits = limits
        self._pool = Pool(self.servers, self._ask, self._check, limits)
        self._client: httpx.AsyncClient | None = None
        # Not an end of turn, not banned: any ordinary token serves for the probe.
        special = {rules.stop_id, rules.pad_id, *rules.never}
        self._probe_token = next(i for i in reversed(range(rules.size)) if i not in special)

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
    ) -> Rollout:
        """See `contract.Sampler.complete`. Entropies are NaN: vLLM does not compute them.

        A thought budget is kept by further requests for the rows it cuts, which continue their
        token ids; over pictures the server closes thoughts itself, see `vllm_protocol`.

        Raises:
            ValueError: a setting vLLM cannot keep, or a server completed another prompt than the
                trainer's, reports log-probs of another kind, or does not apply bans or budgets.
            NoServers: requests are unanswered, with every server and its last failure.
        """
        rows: list[Completion] = []

        def sample() -> None:
            answers = self._answers(requests, sampling, group_size, generator)
            numbered = [one for some in answers for one in some]
            for _, found in sorted(numbered, key=lambda one: one[0]):
                rows.extend(found)

        self.ranks.on_main(sample)
        return exchange_rows(
            assemble(rows, self.rules.pad_id) if self.ranks.is_main else nothing(),
            range(len(rows)),
            [self.copies.rows(len(requests), group_size, rank) for rank in range(self.ranks.size)],
            self.ranks,
            pad_id=self.rules.pad_id,
        )

    def stream(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
        batch_prompts: int,
    ) -> Iterator[tuple[list[int], Rollout]]:
        """See `contract.Sampler.stream`; a prompt is sent as soon as there is room for it.

        `batch_prompts` is not read: `ServerLimits.concurrency` says how many are under way. Only
        the first process draws requests.

        Raises:
            ValueError, NoServers: as `complete`.
        """
        with closing(self._answers(requests, sampling, group_size, generator)) as answers:
            while some := self.ranks.on_main(lambda: next(answers, None)):
                rows = [row for _, rows in some for row in rows]
                yield [number for number, _ in some], assemble(rows, self.rules.pad_id)

    def _answers(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        group_size: int,
        generator: torch.Generator,
    ) -> Generator[list[tuple[int, list[Completion]]], None, None]:
        """Completions of prompts with the numbers of these, in the order in which they come."""
        check_sampling(sampling)
        if sampling.budget is not None and sampling.budget >= sampling.max_tokens:
            sampling = replace(sampling, budget=None)
        # The completions of greedy decoding are one, and vLLM wants to be asked for one.
        count = group_size if sampling.temperature > 0 else 1
        prompts = (self._prompt(request, sampling, count, generator) for request in requests)

        async def complete(prompt: _Prompt) -> list[Completion]:
            return await self._complete(prompt, sampling) * (group_size // count)

        return as_they_come(lambda take: self._with_client(self._pool.run(prompts, complete, take)))

    def _prompt(
        self, request: Request, sampling: Sampling, count: int, generator: torch.Generator
    ) -> _Prompt:
        seed = _seeds(1, generator)[0] if request.seed is None else request.seed
        further = 0 if sampling.budget is None else count
        call = self._call(request, sampling, count, seed)
        seeds = _seeds(further, torch.Generator().manual_seed(seed))
        return _Prompt(request.example.prompt_ids, call, seeds)

    def _call(self, request: Request, sampling: Sampling, count: int, seed: int) -> Call:
        """The first request for a prompt; without pictures it ends where a budget is spent."""
        if request.sample.images:
            request = replace(request, max_tiles=request.max_tiles or self._max_tiles)
            step = -1 if self.step is None else self.step
            return chat_call(
                request,
                sampling,
                self.rules,
                count=count,
                max_tokens=sampling.max_tokens,
                seed=seed,
                step=step,
                placeholder=self._placeholder,
            )
        ids = request.example.prompt_ids
        length = sampling.max_tokens if sampling.budget is None else sampling.budget
        return completion_call(ids, sampling, self.rules, count=count, max_tokens=length, seed=seed)

    async def _complete(self, prompt: _Prompt, sampling: Sampling) -> list[Completion]:
        """Complete a prompt; close the thoughts that have spent their budget and go on behind."""
        found = [Completion()] * prompt.call.count
        if prompt.call.max_tokens:
            found = await self._pool.answer(prompt.call)
        if sampling.budget is None:
            return found

        async def closed(row: Completion, seed: int) -> Completion:
            calls = 0
            while True:
                row = close_thought(row, sampling, self.rules) or row
                left = sampling.max_tokens - len(row.token_ids)
                if row.finished or not left:
                    return row
                ids = prompt.ids + row.token_ids
                call = completion_call(
                    ids, sampling, self.rules, count=1, max_tokens=left, seed=seed + calls
                )
                calls += 1
                (later,) = await self._pool.answer(call, kind=calls)
                row = row.followed_by(later)

        return await asyncio.gather(*map(closed, found, prompt.seeds))

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> None:
        """See `contract.Sampler.update_weights`; a server that is out loads them on its return.

        Raises:
            ValueError: there is no folder to publish to.
            OSError: writing failed.
            NoServers: no server has loaded the weights.
        """
        failure: Exception | None = None
        if self.ranks.is_main:
            try:
                self._publish(tensors, step)
            except Exception as error:
                failure = error
        for _ in tensors:  # gathering weights takes all ranks, to the last one
            pass
        self.step = step

        def load() -> None:
            if failure is not None:
                raise failure
            for server in self.servers:
                server.live, server.retry_at = False, 0.0
            asyncio.run(self._with_client(self._pool.ready()))

        self.ranks.on_main(load)

    def _publish(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> None:
        if self._weights_folder is None:
            raise ValueError("no weights_folder was given: the weights of these servers stay")
        publish(self._weights_folder, self._model_folder, tensors, step, dtype=self._dtype)

    def sleep(self) -> None:
        """Do nothing: servers have accelerators of their own."""

    def wake(self) -> None:
        """Do nothing, as `sleep`."""

    def close(self) -> None:
        """Do nothing: nothing is held between calls."""

    def counters(self) -> dict[str, int]:
        """Return the live servers, and the attempts that failed or were sent twice so far."""
        return {
            "rollout_servers_live": sum(server.live for server in self.servers),
            "rollout_failed_attempts": self._pool.failed,
            "rollout_resent": self._pool.resent,
        }

    async def _with_client(self, work: Coroutine[Any, Any, Result]) -> Result:
        import httpx

        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            headers=IDENTITY, limits=limits, **CLIENT_OPTIONS
        ) as self._client:
            return await work

    async def _ask(self, server: Server, call: Call) -> list[Completion]:
        reply = await self._post(server, call, self._limits.timeout_seconds)
        return read_answer(call, reply, self.rules, server.url)

    async def _post(self, server: Server, call: Call, seconds: float) -> bytes:
        body = json.dumps({"model": server.name, **call.body}).encode()
        return await self._exchange(server, "POST", call.path, body, seconds, call.max_bytes)

    async def _check(self, server: Server) -> None:
        """Ask a server for its model, update its weights, and probe it."""
        await self._exchange(server, "GET", "/health")
        models = await self._exchange(server, "GET", "/v1/models")
        try:
            name = json.loads(models)["data"][0]["id"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise RequestFailed("malformed list of models", retry=True) from error
        if not isinstance(name, str):
            raise RequestFailed("malformed list of models", retry=True)
        server.name = name
        if self.step is not None and server.step != self.step:
            await self._load_weights(server)
        call = probe_call(self.rules, self._probe_token)
        reply = await self._post(server, call, max(_CHECK_SECONDS, self._limits.timeout_seconds))
        read_probe(call, reply, self.rules, self._probe_token, server.url)

    async def _load_weights(self, server: Server) -> None:
        step, server.step = self.step, None
        reload = json.dumps({"method": "reload_weights"}).encode()
        await self._control(server, "/pause?mode=abort")
        await self._control(server, "/collective_rpc", reload, self._limits.update_seconds)
        await self._control(server, "/reset_prefix_cache")
        await self._control(server, "/resume")
        server.step = step

    async def _control(
        self, server: Server, path: str, body: bytes | None = None, seconds: float = _CHECK_SECONDS
    ) -> None:
        try:
            await self._exchange(server, "POST", path, body, seconds)
        except RequestFailed as failure:
            hint = ""
            if failure.reason.startswith("http 404"):
                hint = " (it must run with VLLM_SERVER_DEV_MODE=1)"
            raise RequestFailed(f"{path}: {failure.reason}{hint}", retry=failure.retry) from failure

    async def _exchange(
        self,
        server: Server,
        method: str,
        path: str,
        body: bytes | None = None,
        seconds: float = _CHECK_SECONDS,
        max_bytes: int = _CHECK_BYTES,
    ) -> bytes:
        assert self._client is not None
        url = server.url + path
        return await exchange(self._client, method, url, body, seconds=seconds, max_bytes=max_bytes)


def _seeds(count: int, generator: torch.Generator) -> list[int]:
    """Seeds far enough apart that seed + i of one request is not seed + j of another."""
    return torch.randint(0, 2**48, (count,), generator=generator).tolist()
