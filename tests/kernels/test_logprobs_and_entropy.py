"""Log-probability and entropy from logits, on every implementation this process can run."""
# mypy: disable-error-code="arg-type,union-attr,index,return-value,attr-defined"

import math

import pytest
import torch
from torch import Tensor

from r1v3.kernels import (
    entropy_from_logits,
    logprobs_and_entropy,
    reference,
    selective_log_softmax,
)
from tests.kernels.budget import check_logits
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BIG = [151_674] if INTERPRETED else [151_674, 152_064]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (4 * torch.randn(rows, vocab)).to(dtype), torch.randint(0, vocab, (rows,))


@each_dtype
@pytest.mark.parametrize("temperature", [0.7] if INTERPRETED else [1.0, 0.7])
@pytest.mark.parametrize("vocab", [1, 7, 8, 1023, 1025, 5007])
def test_matches_float64(vocab: int, temperature: float, dtype: torch.dtype) -> None:
    """Fails if an output or the gradient is less accurate than float32 PyTorch allows."""
    check_logits(*make(9, vocab, dtype), temperature=temperature)


@pytest.mark.parametrize("vocab", BIG)
def test_matches_float64_at_model_vocabularies(vocab: int) -> None:
    """Fails at the vocabularies of InternVL3 (rows off 16-byte boundaries) and Qwen2.5."""
    check_logits(*make(3, vocab, torch.bfloat16), temperature=0.7)


def edge_rows() -> dict[str, Tensor]:
    """Rows of 6000 logits that break public kernels; two blocks, so the first can be empty."""
    base = 3 * torch.randn(6000)

    def row(change: slice | list[int], value: float) -> Tensor:
        out = base.clone()
        out[change] = value
        return out

    return {
        "some banned": row(slice(0, None, 3), -math.inf),
        "first block banned": row(slice(0, 4500), -math.inf),
        "last block banned": row(slice(4096, None), -math.inf),
        "one left": row(slice(0, 5999), -math.inf),
        "far below zero": base - 150,
        "large offset": base + 3000,
        "constant": torch.full((6000,), 2.5),
        "tied maxima": row([5, 77, 5000], 30.0),
        "one hot": row([4100], 1000.0),
        "fp16 extremes": torch.where(torch.arange(6000) % 2 == 0, 65504.0, -65504.0),
        "lowest float": row([7], -3.4e38),
        "all lowest": torch.full((6000,), -3.0e35),
    }


@pytest.mark.parametrize("temperature", [1.0] if INTERPRETED else [1.0, 1e-3, 50.0])
@pytest.mark.parametrize("name", edge_rows())
def test_edge_rows(name: str, temperature: float) -> None:
    """Fails if a legal row gives NaN, or loses digits where it need not."""
    row = edge_rows()[name]
    ids = torch.tensor([0, 3, 4100, 5999])
    _, entropy = check_logits(row.expand(4, -1).clone(), ids, temperature=temperature)
    assert (entropy >= 0).all() and (entropy <= math.log(6000) + 1e-5).all()


def test_a_row_of_minus_infinity() -> None:
    """Fails if a row with everything banned gives NaN: logp -inf, entropy 0, gradient 0."""
    logits = torch.randn(3, 5000)
    logits[1] = -math.inf
    logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1, 2, 3]))
    (torch.where(logprobs.isfinite(), logprobs, 0.0).sum() + entropy.sum()).backward()
    assert logprobs[1] == -math.inf and entropy[1] == 0
    assert (logits.grad[1] == 0).all() and logits.grad.isfinite().all()
    logits.grad = None
    logprobs_and_entropy(logits, torch.tensor([1, 2, 3]))[0][1].backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 4500, 4999])
def test_broken_logits_stay_visible(bad: float, where: int) -> None:
    """Fails if NaN or +inf is hidden in its own row, or leaks into another."""
    logits = torch.randn(3, 5000)
    logits[1, where] = bad
    logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1, 2, 3]))
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    (logprobs + entropy).sum().backward()
    assert logits.grad[1].isnan().any() and logits.grad[[0, 2]].isfinite().all()


def test_ignored_label() -> None:
    """Fails if label -100 reads memory, or lets a log-probability gradient through."""
    logits, ids = make(4, 50)
    ids[1] = -100
    logprobs, _ = check_logits(logits, ids)
    assert logprobs[1] == 0
    logits.requires_grad_()
    logprobs_and_entropy(logits, ids)[0].sum().backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).any()


@pytest.mark.parametrize("label", [50, -1, -99, 10**12])
def test_label_outside_the_vocabulary(label: int, backend: str) -> None:
    """Fails if a wrong label gives a plausible number: raises on CPU, NaN on a device."""
    logits, ids = make(4, 50)
    ids[2] = label
    if backend == "triton":
        logprobs, entropy = logprobs_and_entropy(logits, ids)
        assert logprobs.isnan().tolist() == [False, False, True, False]
        assert entropy.isfinite().all()
        return
    with pytest.raises(ValueError, match=f"token_ids must be in .0, 50.*{label}"):
        logprobs_and_entropy(logits, ids)


def test_selected_rows() -> None:
    """Fails if `rows` computes other rows, or unselected rows get a gradient."""
    logits, ids = make(12, 300)
    rows = torch.tensor([7, 0, 11])
    check_logits(logits.view(3, 4, 300), ids.view(3, 4), rows=rows, vocab_size=280)
    full = logprobs_and_entropy(logits, ids)
    some = logprobs_and_entropy(logits, ids, rows=rows)
    for every, few in zip(full, some, strict=True):
        assert torch.equal(every[rows], few)


@pytest.mark.parametrize("rows", [[0, 12], [-1], [3, 3]])
def test_wrong_rows_raise(rows: list[int], backend: str) -> None:
    """Fails if a row index out of range or repeated corrupts a gradient on CPU."""
    if backend == "triton":
        pytest.skip("a device cannot raise without a synchronisation; documented")
    with pytest.raises(ValueError, match="rows must"):
        entropy_from_logits(torch.randn(12, 5), rows=torch.tensor(rows))


def layouts() -> dict[str, Tensor]:
    x = torch.randn(4, 6, 5, 101)
    return {
        "one row": x[0, 0, 0],
        "shifted": x[0][:, :-1],
        "shifted batch": x[0, 1:, 1:],
        "transposed": x[0].transpose(0, 1),
        "four dimensions": x[:, :, 1:],
        "every second column": x[0, 0, :, ::2],
        "expanded": x[0, 0, :1].expand(5, 101),
        "off alignment": x.view(-1)[3 : 3 + 5 * 101].view(5, 101),
        "no rows": x[:0, :, 0],
        "cut columns": x[0, :, :, 3:90],
    }


@pytest.mark.parametrize("name", layouts())
def test_any_layout(name: str) -> None:
    """Fails if strides, offsets or dimensions of logits change the result."""
    torch.manual_seed(0)
    logits = layouts()[name]
    ids = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    x = logits.detach().requires_grad_()
    y = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    outputs = logprobs_and_entropy(x, ids, temperature=0.8)
    expected = reference.logprobs_and_entropy(y, ids, temperature=0.8)
    for got, want in zip(outputs, expected, strict=True):
        assert got.shape == logits.shape[:-1]
        torch.testing.assert_close(got, want)
    sum(value.sum() for value in outputs).backward()
    sum(value.sum() for value in expected).backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("bad", [0.0, 50.0, math.nan, math.inf])
def test_padded_columns(bad: float) -> None:
    """Fails if padded vocabulary columns take probability or get a gradient that is not 0."""
    logits, ids = make(5, 97)
    padded = torch.full((5, 128), bad)
    padded[:, :97] = logits
    padded.requires_grad_()
    got = logprobs_and_entropy(padded, ids, vocab_size=97)
    for value, want in zip(got, logprobs_and_entropy(logits, ids), strict=True):
        torch.testing.assert_close(value, want)
    (got[0].sum() + got[1].sum()).backward()
    assert (padded.grad[:, 97:] == 0).all()
    with pytest.raises(ValueError, match="vocab_size must be at most the 128"):
        logprobs_and_entropy(padded, ids, vocab_size=129)


@each_dtype
@pytest.mark.parametrize("shape", [(6, 5003), (2, 3, 5003)])
@pytest.mark.parametrize("with_rows", [False, True])
def test_in_place_backward(shape: tuple[int, ...], with_rows: bool, dtype: torch.dtype) -> None:
    """Fails if the in-place gradient has other bits, other memory, or can be used twice."""
    logits = torch.randn(shape).to(dtype)
    ids = torch.randint(0, 5000, shape[:-1])
    rows = torch.tensor([4, 1]) if with_rows else None
    gradients = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1  # not a leaf, as the output of an lm_head is not
        x.retain_grad()
        options = dict(rows=rows, vocab_size=5000, temperature=0.9, inplace_backward=inplace)
        logprobs, entropy = logprobs_and_entropy(x, ids, **options)
        loss = logprobs.sum() - 0.1 * entropy.sum()
        loss.backward(retain_graph=True)
        gradients.append(leaf.grad.clone())
        assert torch.equal(x.detach(), leaf.grad if inplace else logits)
        if inplace:
            with pytest.raises(RuntimeError, match="second backward needs inplace_backward=False"):
                loss.backward()
    assert torch.equal(*gradients)


def test_in_place_backward_leaves_shared_memory_alone() -> None:
    """Fails if the rows of an expanded tensor, which share memory, are overwritten by one."""
    base = torch.randn(1, 40, requires_grad=True)
    x = base.expand(3, 40)
    kept = base.detach().clone()
    logprobs_and_entropy(x, torch.tensor([1, 2, 3]), inplace_backward=True)[0].sum().backward()
    assert torch.equal(base.detach(), kept)


def test_logits_changed_before_the_backward_raise() -> None:
    """Fails if a gradient is computed from logits that somebody has overwritten."""
    leaf = torch.randn(2, 9, requires_grad=True)
    x = leaf * 1
    loss = logprobs_and_entropy(x, torch.tensor([1, 2]))[0].sum()
    x.detach().zero_()
    x.mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_outputs_may_be_overwritten() -> None:
    """Fails if the backward reads the entropy that the caller was given."""
    gradients = []
    for change in (False, True):
        torch.manual_seed(0)
        x = torch.randn(3, 70, requires_grad=True)
        logprobs, entropy = logprobs_and_entropy(x, torch.tensor([1, 2, 3]))
        loss = logprobs.sum() + entropy.sum()
        if change:
            entropy.detach().fill_(7.0)
            logprobs.detach().fill_(7.0)
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_rows_without_upstream_gradient_are_zero() -> None:
    """Fails if 0 * NaN from a row nobody uses reaches the gradient."""
    logits, ids = make(3, 4500)
    logits[1] = math.nan
    logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, ids)
    upstream = torch.tensor([1.0, 0.0, 2.0])
    torch.autograd.backward([logprobs, entropy], [upstream, upstream])
    assert (logits.grad[1] == 0).all() and logits.grad.isfinite().all()


def test_single_outputs() -> None:
    """Fails if the functions with one output differ from the one with two."""
    logits, ids = make(5, 64)
    both = logprobs_and_entropy(logits, ids, temperature=0.6)
    assert torch.equal(both[0], selective_log_softmax(logits, ids, temperature=0.6))
    assert torch.equal(both[1], entropy_from_logits(logits, temperature=0.6))
    gradients = []
    for function in (
        lambda x: logprobs_and_entropy(x, ids)[1],
        lambda x: entropy_from_logits(x),
    ):
        x = logits.clone().requires_grad_()
        function(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_temperature_zero() -> None:
    """Fails if greedy decoding's limit is not: uniform over the maxima, gradient 0."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [5.0, 1.0, 2.0, 0.0], [-math.inf] * 4])
    logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1, 0, 0]), temperature=0.0)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), 0.0, -math.inf]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0, 0.0]))
    other = selective_log_softmax(logits, torch.tensor([0, 2, 0]), temperature=0.0)
    assert (other == -math.inf).all()
    entropy.sum().backward()
    assert (logits.grad == 0).all()


def test_more_than_two_to_the_31_elements() -> None:
    """Fails if an element offset is computed in 32 bits; untouched rows take no memory."""
    logits = torch.empty(14_200, 151_674, dtype=torch.bfloat16)
    rows = torch.tensor([14_199, 0])
    logits[rows] = torch.randn(2, 151_674).bfloat16()
    ids = torch.zeros(14_200, dtype=torch.int64)
    ids[rows] = torch.tensor([151_673, 5])
    got = logprobs_and_entropy(logits, ids, rows=rows)
    want = reference.logprobs_and_entropy(logits[rows], ids[rows])
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("vocab", [1000, 9001])
def test_a_row_does_not_depend_on_the_others(vocab: int, backend: str) -> None:
    """Fails if the batch around a row, or a second run, changes one of its bits."""
    logits, ids = make(16, vocab, torch.bfloat16)
    upstream = torch.randn(2, 16)

    def run(rows: slice) -> tuple[Tensor, ...]:
        x = logits[rows].clone().requires_grad_()
        outputs = logprobs_and_entropy(x, ids[rows])
        torch.autograd.backward(outputs, list(upstream[:, rows]))
        return *(value.detach() for value in outputs), x.grad

    everything = run(slice(None))
    for value, again in zip(everything, run(slice(None)), strict=True):
        assert torch.equal(value, again)
    # With Triton, rows of 9001 keep their alignment only where the index keeps modulo 8.
    starts = [0, 8] if backend == "triton" and vocab % 8 else [0, 3, 8, 13]
    for start in starts:
        for stop in (start + 1, start + 3):
            for value, alone in zip(everything, run(slice(start, stop)), strict=True):
                assert torch.equal(value[start:stop], alone)


def test_wrong_arguments_raise() -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    x, ids = make(3, 8)
    cases = [
        (lambda: logprobs_and_entropy(x, ids, temperature=-1.0), "temperature.*-1.0"),
        (lambda: logprobs_and_entropy(x, ids, temperature=math.nan), "temperature.*nan"),
        (lambda: entropy_from_logits(x, temperature=math.inf), "temperature.*inf"),
        (lambda: logprobs_and_entropy(x, ids[:2]), r"token_ids must have shape \[3\]"),
        (lambda: logprobs_and_entropy(x, ids.float()), "token_ids must be integers"),
        (lambda: logprobs_and_entropy(x.long(), ids), "logits must be a floating-point"),
        (lambda: entropy_from_logits(x, vocab_size=0), "vocab_size must be >= 1"),
        (lambda: entropy_from_logits(x, rows=torch.tensor([0.0])), "rows must be int64"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
