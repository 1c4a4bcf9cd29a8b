"""One rank of a vocabulary-parallel group, started by `test_vocab_parallel.py`.

Every rank compares its
shard with the whole vocabulary and writes its outputs for the bitwise comparison between ranks.
"""
# mypy: disable-error-code="arg-type,union-attr,index,return-value,attr-defined"

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from r1v3.kernels import (
    devices,
    entropy_from_logits,
    linear_grpo_loss,
    linear_logprobs_and_entropy,
    logits_grpo_loss,
    logprobs_and_entropy,
    sample_tokens,
    selective_log_softmax,
)
from tests.kernels.conftest import INTERPRETED

VOCAB, PADDED = 1001, 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Even, with a last rank of padding only, and very uneven.
WIDTHS = {2: [512, 512], 3: [700, 301, 23], 4: [256, 24, 441, 303]}


def whole(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = (4 * torch.randn(12, PADDED)).to(dtype)
    logits[1, :750] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 5] = torch.nan
    logits[4, 999] = torch.inf
    logits[5] += 1000
    ids = torch.randint(0, VOCAB, (12,))
    ids[6], ids[7], ids[8] = -100, VOCAB - 1, 0
    return logits, ids


def check_logits(mine: slice, dtype: torch.dtype, temperature: float | Tensor) -> list[Tensor]:
    logits, ids = whole(dtype)
    upstream = torch.randn(2, 12)
    upstream[:, 2] = 0
    results = []
    for x, options in (
        (logits, {}),
        (logits[:, mine], {"group": dist.group.WORLD}),
        (logits[:, mine].clone(), {"group": dist.group.WORLD, "inplace_backward": True}),
    ):
        leaf = x.detach().clone().requires_grad_()
        outputs = logprobs_and_entropy(
            leaf * 1, ids, temperature=temperature, vocab_size=VOCAB, **options
        )
        torch.autograd.backward(outputs, list(upstream))
        results.append([*(value.detach() for value in outputs), leaf.grad])
    (logprobs, entropy, gradient), *sharded = results
    for got in sharded:
        # 1000 / 0.6 has a float32 rounding error of 6e-5, and each shard its own maximum.
        torch.testing.assert_close(got[0], logprobs, equal_nan=True, rtol=1e-6, atol=1.3e-4)
        torch.testing.assert_close(got[1], entropy, equal_nan=True, rtol=1e-5, atol=1e-4)
        calm = torch.arange(12) != 5
        torch.testing.assert_close(got[0][calm], logprobs[calm], equal_nan=True)
        torch.testing.assert_close(got[1][calm], entropy[calm], equal_nan=True)
        torch.testing.assert_close(got[2][calm], gradient[:, mine][calm], equal_nan=True)
        torch.testing.assert_close(got[2], gradient[:, mine], equal_nan=True, rtol=1e-2, atol=1e-4)
        padded = got[2][:, max(VOCAB - mine.start, 0) :]
        assert (padded == 0).all(), "padded columns got a gradient"
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*sharded, strict=True))
    return sharded[0][:2]


def check_rest(mine: slice) -> None:
    logits, ids = whole(torch.float32)
    group = dist.group.WORLD
    shard = logits[:, mine]
    rows = torch.tensor([9, 0])
    got = selective_log_softmax(shard, ids, rows=rows, vocab_size=VOCAB, group=group)
    want = selective_log_softmax(logits, ids, rows=rows, vocab_size=VOCAB)
    torch.testing.assert_close(got, want)
    got = entropy_from_logits(shard, group=group, temperature=0.0)
    torch.testing.assert_close(got, entropy_from_logits(logits, temperature=0.0), equal_nan=True)
    exact = logits[[0, 1, 5]].double().requires_grad_()
    label = torch.tensor([1, 700, 3])
    part = exact[:, mine].detach().requires_grad_()
    for value, whole_value in zip(
        logprobs_and_entropy(part, label, group=group),
        logprobs_and_entropy(exact, label),
        strict=True,
    ):
        torch.testing.assert_close(value, whole_value)
    if INTERPRETED or shard.is_cuda:
        return  # a device does not raise for a label
    for call in (
        lambda: logprobs_and_entropy(shard, ids + VOCAB, vocab_size=VOCAB, group=group),
        lambda: logprobs_and_entropy(shard, ids, vocab_size=PADDED + 1, group=group),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("a label or vocabulary outside all shards must raise")


def check_several(mine: slice) -> list[Tensor]:
    """Labels in several shards, repeated and ignored, of logits and of a head.

    The gradients of a shard's columns, of padding too, are those of the whole vocabulary.
    """
    logits, one = whole(torch.bfloat16)
    ids = torch.stack([one, one.flip(0), torch.full_like(one, 700), one], 1)
    hidden, weight = torch.randn(12, 16), torch.randn(PADDED, 16)
    upstream = torch.randn(12, 4), torch.randn(12)
    results = []
    for part, options in ((slice(None), {}), (mine, {"group": dist.group.WORLD})):
        found = []
        for function, leaves in (
            (logprobs_and_entropy, [logits[:, part]]),
            (linear_logprobs_and_entropy, [hidden, weight[part]]),
        ):
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            outputs = function(*leaves, ids, temperature=0.7, vocab_size=VOCAB, **options)
            legal = [torch.where(value.isfinite(), value, 0.0) for value in outputs]
            torch.autograd.backward(legal, upstream)
            found += [*(value.detach() for value in outputs), *(leaf.grad for leaf in leaves)]
        results.append(found)
    (*of_logits, grad_logits), (*of_head, grad_weight) = results[0][:3], results[0][3:]
    wanted = [*of_logits, grad_logits[:, mine], *of_head, grad_weight[mine]]
    for got, want in zip(results[1], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-4, equal_nan=True)
    return [*results[1][:2], *results[1][3:6]]


def check_grpo(mine: slice) -> list[Tensor]:
    """The loss of sharded logits, in place and not, is that of the whole vocabulary."""
    logits, ids = torch.randn(2, 5, PADDED), torch.randint(0, VOCAB, (2, 5))
    logits[..., VOCAB:] = 9.0
    ids[0, 1] = -100
    mask = torch.tensor([[True, True, False, True, True], [True, True, True, False, False]])
    logits[~mask] = torch.nan
    old = torch.full((2, 5), -7.0)
    results = []
    for part, options in (
        (logits, {}),
        (logits[..., mine], {"group": dist.group.WORLD}),
        (logits[..., mine], {"group": dist.group.WORLD, "inplace_backward": True}),
    ):
        leaf = part.clone().requires_grad_()
        loss, metrics = logits_grpo_loss(
            leaf * 1, ids, old, torch.tensor([1.0, -2.0]), mask, vocab_size=VOCAB,
            temperature=0.7, ref_logprobs=old + 0.1, kl_coef=0.2, **options,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), metrics["token_entropy"], leaf.grad))
    for sharded in results[1:]:
        torch.testing.assert_close(sharded[:2], results[0][:2])
        torch.testing.assert_close(sharded[2], results[0][2][..., mine])
    assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
    return list(results[1][:2])


def check_sampling(mine: slice) -> list[Tensor]:
    """Draws from a sharded vocabulary are those from the whole one, bit for bit."""
    n = 5 if INTERPRETED else 12
    logits, ids = (value[:n] for value in whole(torch.bfloat16))
    logits[0, 512:] += 9  # drawn from one shard, and so are forced tokens
    forced = torch.full((n,), -1)
    forced[1] = 900
    options = {
        "temperature": torch.tensor([0.7, 1.3, 1.0])[torch.arange(n) % 3],
        "banned": ids.abs(), "enabled": torch.arange(n) % 2, "forced": forced, "vocab_size": VOCAB,
    }  # fmt: skip
    outputs = []
    more = ({}, {"temperature": 0.0}) if INTERPRETED else ({}, {"temperature": 0.0}, {"top_p": 0.8})
    for extra in more:
        uniforms = torch.rand(n)
        settings = {**options, **extra}
        want = sample_tokens(logits, uniforms, **settings)
        got = sample_tokens(logits[:, mine], uniforms, **settings, group=dist.group.WORLD)
        for value, wanted in zip(got[:2], want[:2], strict=True):
            assert torch.equal(value.nan_to_num(7.5), wanted.nan_to_num(7.5))
        torch.testing.assert_close(got[2], want[2], equal_nan=True, rtol=1e-6, atol=1e-6)
        outputs += [got[0].float(), *got[1:]]
    if not INTERPRETED:
        exact = sample_tokens(logits.double(), uniforms, **options)
        part = logits[:, mine].double()
        got = sample_tokens(part, uniforms, **options, group=dist.group.WORLD)
        assert torch.equal(got[0], exact[0])
        torch.testing.assert_close(got, exact, equal_nan=True)
    return outputs


def check_collectives(mine: slice) -> None:
    """A forward has one collective, and a backward none, once the widths are known."""
    logits, ids = whole(torch.float32)
    called: list[str] = []

    def counted(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            called.append(name)
            return original(*args, **kwargs)

        return call

    for name in ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce"):
        if hasattr(dist, name):
            setattr(dist, name, counted(name, getattr(dist, name)))
    for dtype in (torch.float32, torch.bfloat16):
        x = logits[:, mine].to(dtype).requires_grad_()
        sum(logprobs_and_entropy(x, ids, vocab_size=VOCAB, group=dist.group.WORLD)).sum().backward()
    assert len(called) == 2 and "all_reduce" not in called, called


def check_linear(mine: slice) -> None:
    hidden, weight = torch.randn(2, 7, 16), torch.randn(PADDED, 16)
    ids, mask = torch.randint(0, VOCAB, (2, 7)), torch.rand(2, 7) < 0.7
    results = []
    for w, group in ((weight, None), (weight[mine], dist.group.WORLD)):
        h = hidden.clone().requires_grad_()
        w = w.clone().requires_grad_()
        logprobs, entropy = linear_logprobs_and_entropy(
            h, w, ids, loss_mask=mask, vocab_size=VOCAB, temperature=0.7, group=group
        )
        loss, _ = linear_grpo_loss(
            h, w, ids, logprobs.detach() - 0.05, torch.tensor([1.0, -2.0]), mask,
            vocab_size=VOCAB, group=group,
        )  # fmt: skip
        (loss + logprobs.sum() + entropy.sum()).backward()
        results.append((logprobs, entropy, loss, h.grad, w.grad))
    full, shard = results
    for a, b in zip(full[:4], shard[:4], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shard[4], full[4][mine], rtol=1e-4, atol=1e-5)


def main(folder: Path, device: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if device == "cuda":  # one GPU serves several ranks: gloo, not NCCL
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_default_device(device)
    if INTERPRETED:
        devices.runs_triton = lambda tensor: tensor.dtype in devices.HALF_OR_SINGLE
        warnings.simplefilter("ignore", RuntimeWarning)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    start = sum(WIDTHS[world][:rank])
    mine = slice(start, start + WIDTHS[world][rank])
    outputs = []
    for dtype in (torch.bfloat16,) if INTERPRETED else DTYPES:
        by_row = torch.tensor([0.6, 1.0, 0.7, 1.3] * 3)
        by_row[9] = 0  # the largest logit wins, in whatever shard it is
        for temperature in (0.6, by_row)[: 1 + (world == 2)] if INTERPRETED else (1.0, 0.6, by_row):
            outputs += check_logits(mine, dtype, temperature)
    outputs += check_grpo(mine)
    outputs += check_sampling(mine)
    if not INTERPRETED:  # a compiled rank shows the same
        check_rest(mine)
        check_linear(mine)
        outputs += check_several(mine)
    check_collectives(mine)
    unsharded = entropy_from_logits(torch.zeros(1, 8))
    assert abs(unsharded.item() - 2.0794415) < 1e-6, "group=None must not mean the world group"
    torch.save([value.cpu().nan_to_num() for value in outputs], folder / f"{rank}.pt")
    dist.destroy_process_group()
