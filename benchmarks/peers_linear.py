"""Adapters to rivals' language heads, which take hidden states; `peers` says which and when."""

from types import ModuleType

from torch import Tensor

from benchmarks import bench_linear_grpo_loss
from benchmarks.problem import Function


def verl_torch(verl: ModuleType) -> Function:
    head = verl.FusedLinearForPPO(chunk_size=512)
    return lambda hidden, weight, token_ids: head(hidden, weight, token_ids)


def verl_triton(verl: ModuleType) -> Function:
    return lambda hidden, weight, token_ids: verl.linear_cross_entropy(
        hidden, weight, token_ids, 1.0, "none", None
    )


def liger_scaled(liger: ModuleType) -> Function:
    function = liger.LigerFusedLinearScaledCrossEntropyFunction

    def both(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = function.apply(hidden, weight, token_ids, 1.0, -100, 1, True)
        return -nll, entropy

    return both


def liger_cross_entropy(liger: ModuleType) -> Function:
    loss = liger.LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, token_ids: (loss(weight, hidden, token_ids),)


def liger_grpo(liger: ModuleType) -> Function:
    loss = liger.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="bnpo",
        epsilon_low=bench_linear_grpo_loss.CLIP_LOW, epsilon_high=bench_linear_grpo_loss.CLIP_HIGH,
    )  # fmt: skip

    def grpo(
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor]:
        states = hidden.view(*token_ids.shape, -1)
        given = loss(
            states, weight, token_ids, loss_mask, advantages, old_per_token_logps=old_logprobs
        )
        return (given[0],)

    return grpo


def rl_kernel(registry: ModuleType) -> Function:
    op = registry.kernel_registry.get_op("linear_logp")
    return lambda hidden, weight, token_ids: (op(hidden, weight, token_ids),)


def quack_all_logits(quack: ModuleType) -> Function:
    return lambda hidden, weight, token_ids: (
        -quack.linear_cross_entropy_func(hidden, weight, None, token_ids, reduction="none"),
    )


def quack_cross_entropy(quack: ModuleType) -> Function:
    return lambda hidden, weight, token_ids: (
        quack.chunked_linear_cross_entropy(hidden, weight, token_ids, reduction="mean"),
    )


def cut_cross_entropy(module: ModuleType) -> Function:
    return lambda hidden, weight, token_ids: (
        -module.linear_cross_entropy(hidden, weight, token_ids, reduction="none"),
    )


def cut_cross_entropy_mean(module: ModuleType) -> Function:
    return lambda hidden, weight, token_ids: (
        module.linear_cross_entropy(hidden, weight, token_ids, reduction="mean"),
    )
