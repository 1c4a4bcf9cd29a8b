"""The division of an episode among gradient steps and replicas, and of its tokens among ranks."""

from collections.abc import Sequence

from r1v3.config import GRPO
from r1v3.engine.contract import Engine
from r1v3.model.flops import Work
from r1v3.trainer.episode import Episode, Pack, Part
from r1v3.trainer.policy_loss import normalizer


def divide(
    episode: Episode,
    packs: Sequence[Sequence[Pack]],
    engine: Engine,
    replica_of: Sequence[int],
    config: GRPO,
) -> tuple[list[Part], list[Work]]:
    """Give this replica its micro-batches of each gradient step; fetch their tokens.

    Groups without an advantage have no gradient where there is no KL term: they are left out, or
    passed through the model for their metrics alone (`measure_all`).

    Args:
        packs: the micro-batches of each gradient step; flat groups are apart from others.
        replica_of: the replica of every rank.

    Returns:
        The parts, and the work of all micro-batches of all replicas, by their number.
    """
    chosen: list[Pack] = []
    steps: list[tuple[list[int], list[int]]] = []
    for step in packs:
        learned, measured = list[int](), list[int]()
        for pack in step:
            taught = config.loss.kl_coef > 0 or bool(episode.advantages[pack[1]].any())
            if taught or config.measure_all:
                (learned if taught else measured).append(len(chosen))
                chosen.append(pack)
        steps.append((learned, measured))
    works = [episode.work(pack) for pack in chosen]

    def shares(numbers: Sequence[int]) -> list[list[int]]:
        found = engine.shares([works[number] for number in numbers])
        return [[numbers[i] for i in share] for share in found]

    divided = [(shares(learned), shares(measured)) for learned, measured in steps]
    rows: list[list[int]] = [
        [row for step in divided for kind in step for n in kind[replica] for row in chosen[n][1]]
        for replica in range(engine.replicas.size)
    ]
    pad_id = engine.tokenizer.pad_token_id
    here = episode.fetch([rows[replica] for replica in replica_of], engine.ranks, pad_id)
    own, parts = engine.replicas.rank, []
    for packed, (learned, measured), shared in zip(packs, steps, divided, strict=True):
        lengths = [episode.facts[row].length for _, taken in packed for row in taken]
        mine = [kind[own] for kind in shared]
        batches = [[here.micro_batch(chosen[n], pad_id) for n in kind] for kind in mine]
        parts.append(
            Part(
                learned=batches[0],
                measured=batches[1],
                numbers=sum(mine, []),
                learns=bool(learned),
                measures=bool(measured),
                normalizer=normalizer(config.loss.aggregation, lengths, config.decoding.max_tokens),
            )
        )
    return parts, works
