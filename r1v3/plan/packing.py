"""The micro-batches of a stage's step, as its trainer makes them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from r1v3.balance import pack_groups, runs, shared_budget, worthwhile
from r1v3.config import GRPO, Evaluate, Stage, Supervised
from r1v3.plan.memory import Pack


@dataclass(frozen=True)
class LongestSample:
    """Tokens of the longest prompt and of the longest response, and tiles of the prompt."""

    prompt: int
    response: int
    tiles: int

    @property
    def rows(self) -> int:
        """Positions of both; the last token of a response is never an input."""
        return self.prompt + self.response - 1


@dataclass(frozen=True)
class Packing:
    """The micro-batches of a step in which every sequence has its full length.

    packs: each kind, and how many of it. largest: micro-batches that shorter sequences can make,
    of which some rank may need more memory. tokens: the configured limit.
    """

    packs: Mapping[Pack, int]
    largest: tuple[Pack, ...]
    tokens: int | None


def packing_of(config: Stage, data: int, sequence: LongestSample) -> Packing:
    """Return the micro-batches of a stage on `data` replicas.

    Raises:
        ValueError: `micro_batch_tokens` is less than one sequence.
    """
    prompt, response, tiles = sequence.prompt, sequence.response, sequence.tiles
    if isinstance(config, Evaluate):
        packs = {Pack(-(-config.batch_prompts // data), config.samples, prompt, response, tiles): 1}
        return Packing(packs, tuple(packs), None)
    assert isinstance(config, GRPO | Supervised)
    tokens = config.micro_batch_tokens
    if isinstance(config, Supervised):
        prompts, size, group = config.batch_size, config.micro_batch_size, 1
    else:
        prompts = config.prompts_per_step // config.gradient_steps
        size, group = min(config.micro_batch_prompts, prompts), config.group_size
    if tokens is None:
        pack = Pack(size, group, prompt, response, tiles)
        return Packing({pack: -(-prompts // size)}, (pack,), None)
    if tokens < sequence.rows:
        raise ValueError(
            f"micro_batch_tokens {tokens} is less than one sequence takes: a prompt of {prompt} "
            f"and a response of {response} tokens; set it to {sequence.rows} or more"
        )
    least = worthwhile(config, data)
    found: Counter[tuple[int, int]] = Counter()
    if isinstance(config, Supervised):
        budget = shared_budget(prompts * sequence.rows, sequence.rows, tokens, least)
        found.update((len(run), 1) for run in runs([sequence.rows] * prompts, budget, most=size))
    else:
        groups = pack_groups(
            [prompt] * prompts,
            [[response - 1] * group] * prompts,
            size=size,
            tokens=tokens,
            least=least,
        )
        found.update((len(pack), len(pack[0][1])) for pack in groups)
    packs = {Pack(p, g, prompt, response, tiles): n for (p, g), n in found.items()}
    return Packing(packs, (*packs, *_largest(sequence, size, group, tokens)), tokens)


def _largest(sequence: LongestSample, size: int, group: int, tokens: int) -> Iterator[Pack]:
    """Micro-batches of `tokens`: of long responses or short ones, of one prompt or many, and of
    text alone, whose tokens all count."""
    prompt, tiles = sequence.prompt, sequence.tiles
    many = max(1, min(size, tokens // (prompt + 1)))
    full = (tokens - prompt) // max(1, sequence.response - 1)
    for prompts, responses, before, pictures in (
        (1, max(1, min(group, full)), prompt, tiles),
        (1, group, prompt, tiles),
        (many, group, prompt, tiles),
        (1, group, 1, 0),
    ):
        inputs = (tokens // prompts - before) // responses
        yield Pack(prompts, responses, before, min(sequence.response, max(1, inputs + 1)), pictures)
