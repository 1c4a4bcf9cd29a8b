"""Vocabulary-parallel heads of slime, NeMo-RL and ms-swift on two gloo ranks, under torchrun.

Every rank compares stock and r1v3's kernels in the stock's place with float64 arithmetic on whole
logits. Stacks whose source could not be fetched are left out.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from . import trainers
from .comparing import assert_close, results
from .sources import FOLDER

ROWS, LENGTH, VOCABULARY, WIDTH = 2, 8, 300, 16


def truth(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Log-probabilities and entropies by their definition."""
    logs = logits.log_softmax(-1)
    return [logs.gather(-1, labels[..., None])[..., 0], -(logs.exp() * logs).sum(-1)]


def own(whole: Tensor, dim: int = -1) -> Tensor:
    """This rank's part of a tensor."""
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def compare(
    name: str,
    head: Callable[..., Sequence[Tensor | None]],
    use_head: Callable[[], Any],
    wanted: list[Tensor],
    *leaves: Tensor,
) -> None:
    """Assert that stock and r1v3's head, on this rank's leaves, give what is wanted."""
    assert_close(wanted, results(head, *leaves))
    with use_head() as rebound:
        assert rebound.names
        assert_close(wanted, results(head, *leaves))
    print(name, "agrees", flush=True)


def of_logits(pick: Callable[[list[Tensor]], list[Tensor]], labels: Tensor, logits: Tensor) -> Any:
    """Values of a head of this rank's logits, and the gradient of its shard."""
    *values, gradient = results(lambda leaf: pick(truth(leaf, labels)), logits.double())
    return [*values, own(gradient)]


def slime(logits: Tensor, labels: Tensor) -> None:
    """The function below every loss of slime."""
    from r1v3.integrations.slime import use_head

    loss = trainers.slime()
    tokens, responses = [labels[0, :5], labels[0, 4:]], [2, 3]
    arguments = SimpleNamespace(log_probs_chunk_size=-1, allgather_cp=False, entropy_coef=0.1)

    def head(leaf: Tensor) -> list[Tensor]:
        _, found = loss.get_log_probs_and_entropy(
            leaf, args=arguments, unconcat_tokens=tokens, total_lengths=[5, 4],
            response_lengths=responses, with_entropy=True,
        )  # fmt: skip
        return [torch.cat(found["log_probs"]), torch.cat(found["entropy"])]

    rows, predicted = [2, 3, 5, 6, 7], torch.cat([labels[0, 3:5], labels[0, 5:8]])
    flat = logits[:1].repeat(1, 2, 1)[:, :9]
    wanted = of_logits(lambda out: out, predicted, flat[0, rows])
    gradient = torch.zeros(1, 9, VOCABULARY // 2, dtype=torch.float64)
    gradient[0, rows] = wanted[-1]
    compare("slime", head, use_head, [*wanted[:-1], gradient], own(flat))


def nemo_rl(logits: Tensor, labels: Tensor) -> None:
    """Sharded logits, whole and in parts, their entropy, and hidden states that are sharded too."""
    from r1v3.integrations.nemo_rl import use_head

    model_utils = trainers.nemo_rl()
    group, half = dist.group.WORLD, VOCABULARY // 2
    shard = dist.get_rank() * half, (dist.get_rank() + 1) * half
    rolled = labels.roll(-1, -1)
    for chunk in (None, 3):

        def head(leaf: Tensor, chunk: int | None = chunk) -> list[Tensor]:
            return [
                model_utils.from_parallel_logits_to_logprobs(
                    leaf, labels, *shard, group, chunk_size=chunk
                )
            ]

        wanted = of_logits(lambda out: [out[0][:, :-1]], rolled, logits)
        compare(f"NeMo-RL, chunk {chunk}", head, use_head, wanted, own(logits))

    def spread(leaf: Tensor) -> list[Tensor]:
        return [model_utils.ChunkedDistributedEntropy.apply(leaf, 3, group, False)]

    compare(
        "NeMo-RL, entropy", spread, use_head, of_logits(lambda out: [-out[1]], labels, logits),
        own(logits),
    )  # fmt: skip
    hidden, weight = torch.randn(LENGTH, ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH)

    def fused(*leaves: Tensor) -> list[Tensor]:
        return [
            model_utils.from_parallel_hidden_states_to_logprobs(
                *leaves, False, labels, *shard, group, chunk_size=3
            )
        ]

    value, *gradients = results(
        lambda h, w: [truth(h.transpose(0, 1) @ w.T, rolled)[0][:, :-1]],
        hidden.double(), weight.double(),
    )  # fmt: skip
    wanted = [value, *(own(each, 0) for each in gradients)]
    compare("NeMo-RL, hidden states", fused, use_head, wanted, own(hidden, 0), own(weight, 0))


def swift(logits: Tensor, labels: Tensor) -> None:
    """The function of ms-swift's Megatron trainers."""
    from r1v3.integrations.swift import use_head

    functions = trainers.swift_megatron()

    def head(leaf: Tensor) -> Any:
        return functions.compute_logps_and_entropy_from_logits(leaf, labels, compute_entropy=True)

    wanted = of_logits(lambda out: out, labels, logits)
    compare("ms-swift", head, lambda: use_head(megatron=True), wanted, own(logits))


def main() -> None:
    """Compare every stack whose source is there."""
    dist.init_process_group("gloo")
    mpu.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch.manual_seed(0)
    logits = torch.randn(ROWS, LENGTH, VOCABULARY) * 3
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    for distribution, check in (("slime", slime), ("nemo-rl", nemo_rl), ("ms-swift", swift)):
        if (FOLDER / distribution).is_dir():
            check(logits, labels)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
