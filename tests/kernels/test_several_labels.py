"""K labels for each row, in every op that gives log-probabilities, on every implementation here."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1v3.kernels import (
    linear_grpo_loss,
    linear_logprobs_and_entropy,
    logits_grpo_loss,
    logprobs_and_entropy,
    reference,
    selective_log_softmax,
    several_labels,
)
from r1v3.kernels.linear import tiles
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED

pytestmark = pytest.mark.usefixtures("backend")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="not about the arithmetic of a kernel")
DTYPES = [torch.float32, torch.bfloat16]
B, T, K, WIDTH, VOCAB = 2, 4, 5, 24, 300
SHARES = torch.linspace(-1, 2, B * T * K).view(B, T, K), torch.linspace(0.5, -1, B * T).view(B, T)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of several tiles of 128 columns and 3 rows."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(tiles, "CPU_BLOCK_ROWS", 3)


def labels(vocab: int = VOCAB) -> Tensor:
    """[B, T, K] with a row of one label five times, ignored ones, and a row of nothing else."""
    ids = torch.randint(0, vocab, (B, T, K))
    ids[0, 1], ids[0, 2] = ids[0, 1, :1], -100
    ids[1, 0, 1], ids[1, 1, 0] = ids[1, 0, 4], -100
    ids[1, 2, 0], ids[1, 2, 1] = 0, vocab - 1
    return ids


def results(
    function: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor], **options: Any
) -> list[Tensor]:
    """Both outputs, and the gradients of the leaves by a sum of them with weights."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves, **options)
    rows = options.get("rows")
    shares = [share.flatten(0, 1) if rows is None else share.flatten(0, 1)[rows]
              for share in SHARES]  # fmt: skip
    sum(
        (torch.where(value.isfinite(), value, 0.0) * share.to(value).view(value.shape)).sum()
        for value, share in zip(outputs, shares, strict=True)
    ).backward()
    return [*(value.detach() for value in outputs), *(leaf.grad for leaf in leaves)]


def compare(
    function: Any, formula: Any, leaves: list[Tensor], tolerance: float, **options: Any
) -> list[Tensor]:
    """The results, which must be as near to float64 as the formula is in float32."""
    truth = results(formula, [leaf.double() for leaf in leaves], **options)
    baseline = results(formula, leaves, **options)
    got = results(function, leaves, **options)
    names = ("logprobs", "entropy", *(f"gradient {i}" for i in range(len(leaves))))
    for name, g, t, b in zip(names, got, truth, baseline, strict=True):
        extra = 0.0
        if g.dtype == torch.bfloat16:  # rounded once, where autograd's is; truncated by Triton's
            extra = 2.0 ** -(7 if INTERPRETED else 8) * t.abs().nan_to_num().max().item()
        assert_within_budget(name, g, t, b, tolerance + extra)
    return got


@pytest.mark.parametrize("dtype", DTYPES[1:] if INTERPRETED else DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype) -> None:
    """Fails if a label's log-probability, or the gradient in any column, is not the formula's."""
    logits, ids = (4 * torch.randn(B, T, 2 * VOCAB + 3)).to(dtype), labels()
    logits[0, 0, ::3], logits[1, 1] = -math.inf, -math.inf
    degrees = torch.tensor([[0.7, 1.0, 1.3, 0.3], [50.0, 0.7, 0.2, 1.0]])
    options = {"token_ids": ids, "temperature": degrees, "vocab_size": VOCAB}
    got = compare(logprobs_and_entropy, reference.logprobs_and_entropy, [logits], 1e-5, **options)
    assert (got[0][ids == -100] == 0).all() and (got[2][..., VOCAB:] == 0).all()
    assert (got[0][1, 1, 1:] == -math.inf).all() and (got[2][1, 1] == 0).all()
    if INTERPRETED:
        return
    options["rows"] = torch.tensor([6, 0, 1])
    compare(logprobs_and_entropy, reference.logprobs_and_entropy, [logits], 1e-5, **options)
    wide = logits.transpose(0, 1).contiguous().transpose(0, 1)[..., : 2 * VOCAB]
    again = results(logprobs_and_entropy, [wide], **options)
    assert torch.equal(again[0], results(selective, [wide], **options)[0])
    alone = selective_log_softmax(logits[0, 3], ids[0, 3], temperature=0.3, vocab_size=VOCAB)
    assert torch.equal(alone, got[0][0, 3])


def selective(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logprobs = selective_log_softmax(logits, **options)
    return logprobs, logprobs.new_zeros(logprobs.shape[:-1])


@not_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_one_is_that_of_the_row(dtype: torch.dtype) -> None:
    """Fails if [..., 1] is another quantity than [...], where p is nearly 1 too."""
    logits = (4 * torch.randn(B * T, VOCAB)).to(dtype)
    logits[3, 5] = 40.0
    ids = torch.randint(0, VOCAB, (B * T,))
    ids[3], ids[4] = 5, -100
    each = []
    for one in (ids, ids[:, None]):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = logprobs_and_entropy(leaf, one, temperature=0.7)
        (2 * logprobs.sum() + entropy.sum()).backward()
        each.append((logprobs.detach().view(-1), entropy.detach(), leaf.grad))
    for one, several in zip(*each, strict=True):
        close = {"rtol": 2.0**-8, "atol": 1e-9} if one.dtype != torch.float32 else {}
        torch.testing.assert_close(several, one, **close)


@not_interpreted
def test_rows_do_not_depend_on_each_other() -> None:
    """Fails if a row's bits, or those of its gradient, differ in another batch or in place."""
    logits, ids = torch.randn(B * T, VOCAB), labels().view(-1, K)
    upstream = torch.randn(B * T, K)

    def run(which: Tensor, **options: Any) -> list[Tensor]:
        leaf = logits[which].requires_grad_()
        logprobs, _ = logprobs_and_entropy(leaf * 1, ids[which], **options)
        logprobs.backward(upstream[which])
        return [logprobs.detach(), leaf.grad]

    everything = run(torch.arange(B * T))
    for which in (torch.tensor([3]), torch.tensor([1, 7, 4])):
        for whole, some in zip(everything, run(which), strict=True):
            assert torch.equal(whole[which], some)
    inplace = run(torch.arange(B * T), inplace_backward=True)
    assert all(torch.equal(a, b) for a, b in zip(everything, inplace, strict=True))


@pytest.mark.parametrize("op", ["logits", "head"])
def test_edges(op: str, backend: str) -> None:
    """Fails if no labels, temperature 0 or labels out of range break the contract."""
    function: Any = logprobs_and_entropy if op == "logits" else linear_logprobs_and_entropy
    given = [torch.eye(2, 9)] if op == "logits" else [torch.eye(2), torch.eye(9, 2)]
    leaves = [leaf.clone().requires_grad_() for leaf in given]
    none, entropy = function(*leaves, torch.zeros(2, 0, dtype=torch.int64))
    assert none.shape == (2, 0) and (entropy > 1.9).all()
    entropy.sum().backward()
    assert all((leaf.grad != 0).any() for leaf in leaves)
    ids = torch.tensor([[0, 3], [-100, 1]], dtype=torch.int32)
    coldest, _ = function(*leaves, ids, temperature=0.0)
    assert coldest.tolist() == [[0.0, -math.inf], [0.0, 0.0]]
    leaves[0].grad = None
    coldest[:, 0].sum().backward()
    assert (leaves[0].grad == 0).all()
    outside = torch.tensor([[0, 9], [1, -1]])
    if backend in CPU_BACKENDS:
        with pytest.raises(ValueError, match=r"token_ids must be in \[0, 9\) or -100, got \[9, -1"):
            function(*given, outside)
    elif op == "logits":
        assert function(*given, outside)[0].isnan().tolist() == [[False, True]] * 2
    if op == "logits":
        given[0][1, 4] = math.nan
        assert function(*given, ids)[0].isnan().tolist() == [[False, False], [False, True]]


@not_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_the_head_matches_float64(dtype: torch.dtype) -> None:
    """Fails if a tile of the head loses a label, or counts one of another tile."""
    leaves = [torch.randn(B, T, WIDTH).to(dtype), (0.5 * torch.randn(VOCAB, WIDTH)).to(dtype)]
    options = {"token_ids": labels(VOCAB - 9), "vocab_size": VOCAB - 9, "temperature": 0.7}
    options["loss_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    formula = reference.linear_logprobs_and_entropy
    got = compare(linear_logprobs_and_entropy, formula, leaves, 2e-5, **options)
    assert (got[0][1, 2] == 0).all() and (got[0][0, 2] == 0).all() and got[1][0, 2] == 0
    assert (got[3][VOCAB - 9 :] == 0).all()
    del options["loss_mask"]
    rows = torch.tensor([7, 0, 2])
    some = results(linear_logprobs_and_entropy, leaves, **options, rows=rows)[0]
    torch.testing.assert_close(some[:2], got[0].flatten(0, 1)[rows[:2]])


@not_interpreted
def test_gradcheck(backend: str) -> None:
    """Fails if a gradient in closed form is not the derivative, of repeated labels too."""
    if backend not in CPU_BACKENDS[:1]:
        pytest.skip("float64 is the reference's")
    ids = torch.tensor([[3, 3, 0, 3], [-100, 1, 6, 5], [2, 2, 1, 1]])
    logits, hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 7), (3, 2), (7, 2))
    )
    degrees = torch.tensor([0.4, 2.0, 1.0])

    def of_logits(x: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(x, ids, temperature=degrees)

    def of_head(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs_and_entropy(h, w, ids, temperature=degrees)

    assert torch.autograd.gradcheck(of_logits, (logits,))
    assert torch.autograd.gradcheck(of_head, (hidden, weight))


@not_interpreted
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9))
def test_properties(seed: int, n: int, vocab: int, k: int) -> None:
    """Fails if all labels' probabilities do not sum to 1, or the order of the labels matters.

    A repeated label must have the gradient of one with the sum of their upstream gradients.
    """
    torch.manual_seed(seed)
    logits = 3 * torch.randn(n, vocab)
    every = selective_log_softmax(logits, torch.arange(vocab).expand(n, -1))
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(n))
    ids, order = torch.randint(0, vocab, (n, k)), torch.randperm(k)
    ids[torch.rand(n, k) < 0.2] = -100
    upstream = torch.randn(n, k)
    gradients = []
    for chosen in (torch.arange(k), order):
        leaf = logits.clone().requires_grad_()
        logprobs = selective_log_softmax(leaf, ids[:, chosen])
        logprobs.backward(upstream[:, chosen])
        gradients.append(leaf.grad)
        known = ids[:, chosen] != -100
        want = every.gather(1, ids[:, chosen].clamp(min=0))
        assert torch.equal(logprobs, torch.where(known, want, 0.0))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
    counted = torch.zeros(n, vocab).scatter_add(
        1, ids.clamp(min=0), torch.where(ids == -100, 0.0, upstream)
    )
    want = counted - every.exp() * counted.sum(1, keepdim=True)
    torch.testing.assert_close(gradients[0], want, rtol=1e-5, atol=1e-5)


@not_interpreted
def test_sums_have_the_same_bits_in_any_batch() -> None:
    """Fails if the sum of a row's upstream gradients, or of equal labels, depends on the batch."""
    upstream, ids = torch.randn(64, 37), torch.randint(0, 5, (64, 37))
    together = several_labels.summed_gradients(upstream, ids)
    alone = [several_labels.summed_gradients(upstream[[i]], ids[[i]]) for i in range(64)]
    assert torch.equal(together, torch.cat(alone))
    for row in range(64):
        for token in range(5):
            sums = together[row, 1:][ids[row] == token]
            assert (sums == sums[:1]).all()


def test_wrong_shapes_raise() -> None:
    """Fails if labels of another shape go through, or a policy loss takes several for a token."""
    x, h, w = torch.randn(1, 3, 9), torch.randn(1, 3, 6), torch.randn(9, 6)
    ids = torch.zeros(1, 3, 2, dtype=torch.int64)
    for call in (
        lambda ids: logprobs_and_entropy(x, ids),
        lambda ids: selective_log_softmax(x, ids),
        lambda ids: linear_logprobs_and_entropy(h, w, ids),
    ):
        for bad in (ids[:, :2], ids[..., None], ids[0]):
            with pytest.raises(ValueError, match=r"shape \[1, 3\], or \[1, 3, 'K'\] of K labels"):
                call(bad)
    rest = None, torch.ones(1), torch.ones(1, 3)
    for policy in (
        lambda: logits_grpo_loss(x, ids, *rest),
        lambda: linear_grpo_loss(h, w, ids, *rest),
    ):
        with pytest.raises(ValueError, match="policy loss is of one token in each row.*several"):
            policy()
