"""Continuous batching: completions join and leave the batch between two steps of the model.

One thread owns the model. It takes jobs in order of arrival, runs the prompts of those that have
rows, and extends all rows by one token at a time. A row reads its own keys, its own logits and its
own random numbers.
"""

import asyncio
import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from r1v3.data.encoding import Example, collate
from r1v3.data.thoughts import BudgetedThought
from r1v3.engine.hf.rows import RowDecoder
from r1v3.kernels import sample_tokens
from r1v3.rollout.contract import TokenRules
from r1v3.serve.errors import Refusal
from r1v3.serve.metrics import Metrics
from r1v3.serve.text import Writer

_UNIFORMS = 64
_PROMPTS = 8


@dataclass(frozen=True)
class Truncation:
    """Limits on what is drawn, as `sample_tokens` takes them, and the banned token ids."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """The choice of tokens of one job.

    Attributes:
        seed: of the first completion's random numbers; completion i has seed + i.
        biases: added to the logits, by token id.
        alternatives: most likely tokens to report at every step.
    """

    temperature: float
    seed: int
    truncation: Truncation = Truncation()
    biases: tuple[tuple[int, float], ...] = ()
    alternatives: int = 0


@dataclass(frozen=True)
class Token:
    """A token of a completion with the log-probability and entropy, in nats, it was drawn with."""

    id: int
    logprob: float
    entropy: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass
class Delta:
    """Further tokens and text of a completion.

    Attributes:
        sample: number of the completion in its job.
        thought_tokens: how many of `tokens` belong to a thought.
        finish: "stop" or "length" with the last delta.
        error: why there will be no further ones.
    """

    sample: int
    thought: str = ""
    answer: str = ""
    tokens: list[Token] = field(default_factory=list)
    thought_tokens: int = 0
    finish: str | None = None
    error: str | None = None

    def add(self, later: "Delta") -> None:
        """Append a later delta of the same completion."""
        self.thought += later.thought
        self.answer += later.answer
        self.tokens += later.tokens
        self.thought_tokens += later.thought_tokens
        self.finish, self.error = later.finish, later.error


class Job:
    """A prompt to complete `samples` times.

    Args:
        budget: tokens after which a thought is closed, or None.
        stream: deltas come token by token, otherwise one for each completion at its end.
        deltas: where they go, in the event loop that the batcher serves.
    """

    def __init__(
        self,
        example: Example,
        drawing: Drawing,
        *,
        samples: int,
        max_tokens: int,
        thinking: bool,
        budget: int | None,
        stops: Sequence[str],
        stream: bool,
    ) -> None:
        self.example, self.drawing = example, drawing
        self.samples, self.max_tokens, self.thinking = samples, max_tokens, thinking
        self.budget, self.stops, self.stream = budget, tuple(stops), stream
        self.deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self.cancelled = False


class Row:
    """One completion that is being decoded."""

    def __init__(
        self, job: Job, sample: int, rules: TokenRules, writer: Writer, bias: Tensor | None
    ) -> None:
        self.job, self.sample, self.writer, self.bias = job, sample, writer, bias
        self.thought: BudgetedThought | None = None
        if job.budget is not None and job.thinking:
            self.thought = BudgetedThought(job.budget, rules.closing.forced, job.max_tokens)
        self.length, self.last, self.ended = 0, rules.pad_id, False
        self._rules = rules
        self._whole = Delta(sample)
        self._generator = torch.Generator().manual_seed(job.drawing.seed + sample)
        self._uniforms: Iterator[float] = iter(())

    def uniform(self) -> float:
        """Draw the next random number of this completion, which depends on its seed alone."""
        value = next(self._uniforms, None)
        if value is None:
            drawn: list[float] = torch.rand(_UNIFORMS, generator=self._generator).tolist()
            self._uniforms = iter(drawn)
            return next(self._uniforms)
        return value

    def forced(self) -> int:
        """Return the token that must come now, or -1."""
        token = None if self.thought is None else self.thought.forced_token()
        return -1 if token is None else token

    def take(self, token: Token) -> Delta | None:
        """Append a token; return what the client is to be sent now."""
        self.length, self.last = self.length + 1, token.id
        delta = Delta(self.sample, tokens=[token], thought_tokens=int(self.writer.thinking))
        if self.thought is not None:
            self.thought.read(self._rules.closing.text(token.id))
        ended = token.id == self._rules.stop_id
        pieces = [] if ended else [self.writer.read(token.id)]
        if ended or self.writer.stopped:
            delta.finish = "stop"
        elif self.length == self.job.max_tokens:
            delta.finish = "length"
        if delta.finish is not None:
            self.ended = True
            pieces.append(self.writer.end())
            if self.writer.stopped:  # the text may show it at its very end
                delta.finish = "stop"
        delta.thought = "".join(piece.thought for piece in pieces)
        delta.answer = "".join(piece.answer for piece in pieces)
        if self.job.stream:
            return delta
        self._whole.add(delta)
        return self._whole if delta.finish is not None else None


class Batcher:
    """The thread that decodes, and its queue.

    Args:
        rows: most completions at a time.
        queue: most requests that wait for them.
        vocabulary: bytes of every token id.
        unfinished: see `Writer`.
    """

    def __init__(
        self,
        decoder: RowDecoder,
        rules: TokenRules,
        vocabulary: Sequence[bytes],
        *,
        rows: int,
        queue: int,
        unfinished: str,
        metrics: Metrics,
    ) -> None:
        self.decoder, self.rules, self.vocabulary = decoder, rules, vocabulary
        self.max_rows, self.max_queue, self.unfinished = rows, queue, unfinished
        self.metrics = metrics
        self.rows: list[Row] = []
        self._jobs: deque[Job] = deque()
        self._accepted = 0
        self._changed = threading.Condition()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._device = decoder.model.device
        self._bans: dict[tuple[int, ...], Tensor] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to decode for clients in an event loop."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Stop; what is not finished is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are still decoded."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return max(0, self._accepted - len({id(row.job) for row in list(self.rows)}))

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a request's place in the queue, and later its rows.

        Raises:
            Refusal: there is none.
        """
        if self._accepted >= self.max_rows + self.max_queue:
            told = f"{self._accepted} requests are answered or wait; try again later"
            raise Refusal(429, told, code="queue_full")
        self._accepted += 1
        try:
            yield
        finally:
            self._accepted -= 1

    def submit(self, job: Job) -> None:
        """Queue a job; its deltas will arrive."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job's rows before the next step."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait():
            self._remove(row for row, one in enumerate(self.rows) if one.job.cancelled)
            while jobs := self._admitted():
                self._guarded(jobs, partial(self._join, jobs))
            if self.rows:
                self._guarded([row.job for row in self.rows], self._step)

    def _wait(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._changed:
            while not (self._closing or self.rows or self._jobs):
                self._changed.wait()
            return not self._closing

    def _admitted(self) -> list[Job]:
        """Take jobs from the queue, in order, that have rows; their prompts run together."""
        taken: list[Job] = []
        free = self.max_rows - len(self.rows)
        with self._changed:
            while self._jobs and len(taken) < _PROMPTS:
                if not self._jobs[0].cancelled:
                    free -= self._jobs[0].samples
                    if free < 0:
                        break
                    taken.append(self._jobs[0])
                self._jobs.popleft()
        return taken

    def _guarded(self, jobs: Sequence[Job], work: Callable[[], None]) -> None:
        """Work for jobs; an error ends them, not the server."""
        try:
            work()
        except Exception as error:  # torch raises many types
            traceback.print_exc()
            ended = {id(job): job for job in jobs}
            self.decoder.leave(range(len(self.rows), len(self.decoder.lengths)))
            self._remove(row for row, one in enumerate(self.rows) if id(one.job) in ended)
            failed = Delta(0, error=f"{type(error).__name__} while decoding")
            self._deliver([(job, failed) for job in ended.values()])

    def _join(self, jobs: Sequence[Job]) -> None:
        first = len(self.rows)
        prompts = collate([job.example for job in jobs], self.rules.pad_id)
        logits = self.decoder.join(prompts, [job.samples for job in jobs])
        for job in jobs:
            bias = self._bias(job.drawing, logits)
            for sample in range(job.samples):
                writer = Writer(self.vocabulary, job.thinking, job.stops, self.unfinished)
                self.rows.append(Row(job, sample, self.rules, writer, bias))
            self.metrics.prompt_tokens += len(job.example.prompt_ids)
        self._emit(first, logits)

    def _bias(self, drawing: Drawing, logits: Tensor) -> Tensor | None:
        """The biases of a job for the logits of its rows, [V]."""
        if not drawing.biases:
            return None
        ids, values = zip(*drawing.biases, strict=True)
        bias = logits.new_zeros(min(logits.shape[1], self.rules.size))
        bias[list(ids)] = torch.tensor(values, dtype=bias.dtype, device=bias.device)
        return bias

    def _step(self) -> None:
        last = torch.tensor([row.last for row in self.rows], device=self._device)
        self.metrics.steps += 1
        self._emit(0, self.decoder.step(last))

    def _emit(self, first: int, logits: Tensor) -> None:
        """Choose and send the next token of the rows from `first` on; those that end leave."""
        rows, logits = self.rows[first:], logits[:, : self.rules.size]
        deltas, ended = [], []
        for number, (row, token) in enumerate(zip(rows, self._draw(rows, logits), strict=True)):
            delta = row.take(token)
            if delta is not None:
                deltas.append((row.job, delta))
            if row.ended:
                ended.append(first + number)
        self.metrics.completion_tokens += len(rows)
        self._remove(ended)
        self._deliver(deltas)

    def _remove(self, rows: Iterable[int]) -> None:
        gone = list(rows)
        if gone:
            self.rows = [self.rows[number] for number in self.decoder.leave(gone)]

    def _deliver(self, deltas: list[tuple[Job, Delta]]) -> None:
        def put() -> None:
            for job, delta in deltas:
                job.deltas.put_nowait(delta)

        if deltas and self._loop is not None:
            self._loop.call_soon_threadsafe(put)

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> list[Token]:
        """Draw the next token of every row; rows of one truncation are drawn together."""
        if any(row.bias is not None for row in rows):
            none = torch.zeros_like(logits[0])
            logits = logits + torch.stack([none if r.bias is None else r.bias for r in rows])
        groups: dict[Truncation, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(row.job.drawing.truncation, []).append(number)
        found: dict[int, Token] = {}
        for truncation, numbers in groups.items():
            chosen = [rows[number] for number in numbers]
            part = logits if len(numbers) == len(rows) else logits[numbers]
            drawn = self._draw_group(truncation, chosen, part)
            found.update(zip(numbers, drawn, strict=True))
        return [found[number] for number in range(len(rows))]

    def _draw_group(
        self, truncation: Truncation, rows: Sequence[Row], logits: Tensor
    ) -> list[Token]:
        drawings = [row.job.drawing for row in rows]
        forced = [row.forced() for row in rows]
        tokens, logprobs, entropy = self._sample(
            logits,
            truncation,
            [row.uniform() for row in rows],
            [drawing.temperature for drawing in drawings],
            forced if max(forced) >= 0 else None,
        )
        if bool(logprobs.isnan().any()):
            raise FloatingPointError("the model's logits are not finite")
        found = zip(tokens.tolist(), logprobs.tolist(), entropy.tolist(), strict=True)
        return [
            Token(*values, self._alternatives(drawing, logits[number]))
            for number, (values, drawing) in enumerate(zip(found, drawings, strict=True))
        ]

    def _sample(
        self,
        logits: Tensor,
        truncation: Truncation,
        uniforms: list[float],
        temperatures: list[float],
        forced: list[int] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = self._device
        return sample_tokens(
            logits,
            torch.tensor(uniforms, device=device),
            temperature=torch.tensor(temperatures, dtype=torch.float64, device=device),
            banned=self._banned(truncation.banned),
            forced=None if forced is None else torch.tensor(forced, device=device),
            top_k=truncation.top_k,
            top_p=truncation.top_p,
            min_p=truncation.min_p,
        )

    def _alternatives(self, drawing: Drawing, logits: Tensor) -> tuple[tuple[int, float], ...]:
        """The most likely tokens of one row's distribution [V] with their log-probabilities."""
        truncation, wanted = drawing.truncation, drawing.alternatives
        if not wanted:
            return ()
        banned = set(truncation.banned)
        likely = logits.topk(min(wanted + len(banned), len(logits))).indices.tolist()
        ids = [token for token in likely if token not in banned][:wanted]
        many = len(ids)
        degrees = [drawing.temperature] * many
        spread = logits.expand(many, -1)
        _, logprobs, _ = self._sample(spread, truncation, [0.0] * many, degrees, ids)
        pairs = zip(ids, logprobs.tolist(), strict=True)
        return tuple((token, value) for token, value in pairs if value > -math.inf)

    def _banned(self, ids: tuple[int, ...]) -> Tensor:
        if ids not in self._bans:
            self._bans[ids] = torch.tensor(ids, dtype=torch.int64, device=self._device)
        return self._bans[ids]
