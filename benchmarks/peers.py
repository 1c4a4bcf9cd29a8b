"""Rivals, called where they are installed and named as absent where they are not.

Nothing of them is copied here; an adapter only brings the arguments into their order.
"""

import importlib
import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import (
    bench_group_advantages,
    bench_grpo_loss,
    bench_logits_grpo_loss,
    peers_linear,
)
from benchmarks.bench_logits_options import world_of_one
from benchmarks.problem import Function, Mode

BOTH_MODES: tuple[Mode, ...] = ("forward", "backward")
LINEAR_MODES: tuple[Mode, ...] = (*BOTH_MODES, "forward+backward")


@dataclass(frozen=True)
class Peer:
    """One function of another project that computes what one of our ops computes."""

    project: str
    op: str
    module: str
    adapt: Callable[[ModuleType], Function]
    part: str = ""
    modes: tuple[Mode, ...] = ("forward",)
    cuda_only: bool = False

    @property
    def label(self) -> str:
        return f"{self.project} ({self.part})" if self.part else self.project


def find(
    op: str, mode: Mode, device: str, projects: Collection[str]
) -> tuple[dict[str, Function], dict[str, str]]:
    """Functions by label, and for the rivals that cannot be run the reason by label."""
    found: dict[str, Function] = {}
    absent: dict[str, str] = {}
    for peer in PEERS:
        if peer.op != op or mode not in peer.modes or peer.project not in projects:
            continue
        if importlib.util.find_spec(peer.module.partition(".")[0]) is None:
            absent[peer.label] = "not installed"
        elif peer.cuda_only and device == "cpu":
            absent[peer.label] = "needs a GPU"
        else:
            try:
                found[peer.label] = peer.adapt(importlib.import_module(peer.module))
            except Exception as error:  # noqa: BLE001 - an import may fail in any way
                absent[peer.label] = f"cannot be imported: {type(error).__name__}: {error}"
    return found, absent


def project_names() -> list[str]:
    """All rivals that an adapter exists for."""
    return sorted({peer.project for peer in PEERS})


def _trl_logprobs_and_entropy(trl: ModuleType) -> Function:
    return lambda logits, token_ids: trl.selective_log_softmax_and_entropy(logits, token_ids)


def _trl_entropy(trl: ModuleType) -> Function:
    return lambda logits: (trl.entropy_from_logits(logits),)


def _trl_selective(trl: ModuleType) -> Function:
    return lambda logits, token_ids: (trl.selective_log_softmax(logits, token_ids),)


def _verl_logprobs_and_entropy(verl: ModuleType) -> Function:
    def both(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        entropy = verl.entropy_from_logits(logits)
        return verl.logprobs_from_logits(logits, token_ids, inplace_backward=False), entropy

    return both


def _verl_entropy(verl: ModuleType) -> Function:
    return lambda logits: (verl.entropy_from_logits(logits),)


def _verl_selective(verl: ModuleType) -> Function:
    return lambda logits, token_ids: (
        verl.logprobs_from_logits(logits, token_ids, inplace_backward=False),
    )


def _verl_group_advantages(algorithms: ModuleType) -> Function:
    def advantages(rewards: Tensor) -> tuple[Tensor]:
        n = rewards.shape[0]
        groups = torch.arange(n, device=rewards.device) // bench_group_advantages.GROUP_SIZE
        given = algorithms.compute_grpo_vectorized_outcome_advantage(
            rewards[:, None], torch.ones(n, 1, device=rewards.device), groups
        )
        return (given[0].squeeze(-1),)

    return advantages


def _verl_grpo_loss(algorithms: ModuleType) -> Function:
    config = algorithms.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=bench_grpo_loss.CLIP_LOW,
        clip_ratio_high=bench_grpo_loss.CLIP_HIGH,
        clip_ratio_c=bench_grpo_loss.DUAL_CLIP,
    )

    def loss(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor]:
        per_token = advantages[:, None].expand_as(logprobs)
        value, _ = algorithms.compute_policy_loss_vanilla(
            old_logprobs, logprobs, per_token, loss_mask.float(), "token-mean", config
        )
        return (value,)

    return loss


def _liger_selective(liger: ModuleType) -> Function:
    def selective(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
        rows, vocab = logits.shape
        # It wants one row more than it reads; `random_logits` allocates that row.
        padded = logits.as_strided((1, rows + 1, vocab), ((rows + 1) * vocab, vocab, 1))
        chosen = liger.fused_selective_log_softmax(padded, token_ids[None], temperature=1.0)
        return (chosen[0],)

    return selective


def _trl_kernel(kernel: ModuleType) -> Function:
    return lambda logits, token_ids: kernel.selective_log_softmax_and_entropy(logits, token_ids)


def _trl_kernel_entropy(kernel: ModuleType) -> Function:
    def entropy(logits: Tensor) -> tuple[Tensor]:
        anything = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        return (kernel.selective_log_softmax_and_entropy(logits, anything)[1],)

    return entropy


class _WithOneRowMore(torch.autograd.Function):
    """A loss of [1, rows + 1, V] logits, differentiated without a copy for the row too many."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        rows, vocab = logits.shape
        with torch.enable_grad():
            ctx.padded = logits.detach().as_strided(
                (1, rows + 1, vocab), ((rows + 1) * vocab, vocab, 1)
            )
            ctx.padded.requires_grad_()
            ctx.loss = loss(ctx.padded)
        return ctx.loss.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = torch.autograd.grad(ctx.loss, ctx.padded, upstream)
        return gradient[0, :-1], None


def _liger_grpo(liger: ModuleType) -> Function:
    def grpo(
        logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, count: Tensor
    ) -> tuple[Tensor]:
        def loss(padded: Tensor) -> Tensor:
            per_token = liger.triton_grpo_loss(
                padded, old_logprobs[None], None, token_ids[None], advantages[:1],
                temperature=1.0, beta=0.0, eps_low=bench_logits_grpo_loss.CLIP_LOW,
                eps_high=bench_logits_grpo_loss.CLIP_HIGH, inplace=False, loss_type="grpo",
            )[0]  # fmt: skip
            return per_token.sum() / count

        whole = _WithOneRowMore.apply(logits, loss)
        return (bench_logits_grpo_loss.carried(whole, logits.shape[0]),)

    return grpo


def _megatron_selective(megatron: ModuleType) -> Function:
    def selective(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
        group = world_of_one(logits.device.type)
        # It overwrites what it is given.
        nll = megatron.fused_vocab_parallel_cross_entropy(
            logits.clone()[:, None], token_ids[:, None], group
        )
        return (-nll.squeeze(-1),)

    return selective


def _quack_selective(quack: ModuleType) -> Function:
    return lambda logits, token_ids: (-quack.cross_entropy(logits, token_ids, reduction="none"),)


def _rl_kernel_selective(registry: ModuleType) -> Function:
    op = registry.kernel_registry.get_op("logp")
    return lambda logits, token_ids: (op(logits, token_ids),)


def _triton_cross_entropy(module: ModuleType) -> Function:
    return lambda logits, token_ids: (-module.cross_entropy_loss(logits, token_ids)[0],)


def _transformers_ban(transformers: ModuleType) -> Function:
    built: list[Any] = []

    def ban(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
        if not built:
            built.append(
                transformers.SuppressTokensLogitsProcessor(token_ids.tolist(), logits.device)
            )
        return (built[0](None, logits),)

    return ban


def _xgrammar_ban(xgrammar: ModuleType) -> Function:
    masks: list[Tensor] = []

    def ban(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
        if not masks:
            masks.append(_bitmask(token_ids, logits.shape[1]).expand(logits.shape[0], -1))
            masks[0] = masks[0].contiguous()
        xgrammar.apply_token_bitmask_inplace(logits, masks[0], vocab_size=logits.shape[1])
        return (logits,)

    return ban


def _bitmask(banned: Tensor, vocab: int) -> Tensor:
    """int32 [1, ceil(vocab / 32)], a bit per token from the lowest on, 0 for banned."""
    allowed = torch.ones((vocab + 31) // 32 * 32, dtype=torch.int64, device=banned.device)
    allowed[banned] = 0
    weights = 2 ** torch.arange(32, device=banned.device)
    words = (allowed.view(-1, 32) * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)[None]


_TRL = "trl.trainer.utils"
_TRL_KERNEL = "trl.kernels.logprob_entropy"
_MEGATRON = "megatron.core.fusions.fused_cross_entropy"
_VERL = "verl.utils.torch_functional"
_VERL_ALGORITHMS = "verl.trainer.ppo.core_algos"
_VERL_LINEAR = "verl.utils.experimental.torch_functional"
_VERL_TRITON = "verl.utils.kernel.linear_cross_entropy"
_FLA = "fla.modules.fused_cross_entropy"
_FLASH = "flash_attn.ops.triton.cross_entropy"
_QUACK_LINEAR = "quack.linear_cross_entropy"
_BOTH, _ONE, _LINEAR, _LINEAR_LOSS = (
    "logprobs_and_entropy",
    "selective_log_softmax",
    "linear_logprobs_and_entropy",
    "linear_cross_entropy",
)

PEERS = (
    Peer("trl", _BOTH, _TRL, _trl_logprobs_and_entropy, modes=BOTH_MODES),
    Peer("trl", "entropy", _TRL, _trl_entropy),
    Peer("trl", _ONE, _TRL, _trl_selective),
    Peer("verl", _BOTH, _VERL, _verl_logprobs_and_entropy, modes=BOTH_MODES),
    Peer("verl", "entropy", _VERL, _verl_entropy),
    Peer("verl", _ONE, _VERL, _verl_selective),
    Peer("verl", "group_advantages", _VERL_ALGORITHMS, _verl_group_advantages),
    Peer("verl", "grpo_loss", _VERL_ALGORITHMS, _verl_grpo_loss, modes=("forward+backward",)),
    Peer("verl", _LINEAR, _VERL_LINEAR, peers_linear.verl_torch, "torch", LINEAR_MODES),
    Peer("verl", _LINEAR, _VERL_TRITON, peers_linear.verl_triton, "triton", LINEAR_MODES, True),
    Peer("liger", _ONE, "liger_kernel.ops.grpo_loss", _liger_selective, cuda_only=True),
    Peer(
        "liger",
        _LINEAR,
        "liger_kernel.ops",
        peers_linear.liger_scaled,
        "scaled",
        LINEAR_MODES,
        True,
    ),
    Peer(
        "liger",
        "linear_grpo_loss",
        "liger_kernel.chunked_loss",
        peers_linear.liger_grpo,
        "chunked",
        ("forward+backward",),
    ),
    Peer(
        "rl-kernel",
        _LINEAR,
        "rl_engine.kernels.registry",
        peers_linear.rl_kernel,
        "",
        LINEAR_MODES,
        True,
    ),
    Peer(
        "cut-cross-entropy",
        _LINEAR,
        "cut_cross_entropy",
        peers_linear.cut_cross_entropy,
        "",
        LINEAR_MODES,
        True,
    ),
    Peer(
        "quack",
        _LINEAR,
        _QUACK_LINEAR,
        peers_linear.quack_all_logits,
        "all logits",
        LINEAR_MODES,
        True,
    ),
    Peer(
        "quack",
        _LINEAR_LOSS,
        _QUACK_LINEAR,
        peers_linear.quack_cross_entropy,
        "chunked",
        ("forward+backward",),
        True,
    ),
    Peer(
        "liger",
        _LINEAR_LOSS,
        "liger_kernel.transformers",
        peers_linear.liger_cross_entropy,
        "chunked",
        ("forward+backward",),
        True,
    ),
    Peer(
        "cut-cross-entropy",
        _LINEAR_LOSS,
        "cut_cross_entropy",
        peers_linear.cut_cross_entropy_mean,
        "",
        ("forward+backward",),
        True,
    ),
    Peer("trl", _BOTH, _TRL_KERNEL, _trl_kernel, "triton", BOTH_MODES, True),
    Peer("trl", "entropy", _TRL_KERNEL, _trl_kernel_entropy, "triton", cuda_only=True),
    Peer(
        "liger",
        "logits_grpo_loss",
        "liger_kernel.transformers.grpo_loss",
        _liger_grpo,
        "",
        ("forward+backward",),
        True,
    ),
    Peer("megatron", _ONE, _MEGATRON, _megatron_selective, cuda_only=True),
    Peer("quack", _ONE, "quack.cross_entropy", _quack_selective, cuda_only=True),
    Peer("rl-kernel", _ONE, "rl_engine.kernels.registry", _rl_kernel_selective, cuda_only=True),
    Peer("fla", _ONE, _FLA, _triton_cross_entropy, cuda_only=True),
    Peer("flash-attn", _ONE, _FLASH, _triton_cross_entropy, cuda_only=True),
    Peer("transformers", "ban_tokens", "transformers", _transformers_ban),
    Peer("xgrammar", "ban_tokens", "xgrammar", _xgrammar_ban),
)
