"""Log-probability and entropy from logits, on every implementation this process can run."""
# mypy: disable-error-code="arg-type,union-attr,index,return-value,attr-defined"

import math

import pytest
import torch
from torch import Tensor

from r1v3.kernels import (
    entropy_from_logits,
    logprobs_and_entropy,
    selective_log_softmax,
    softmax_rows,
)
from r1v3.kernels.row_labels import RowLabels
from tests.kernels.budget import check_logits
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED, slow_interpreted

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (4 * torch.randn(rows, vocab)).to(dtype), torch.randint(0, vocab, (rows,))


@each_dtype
@pytest.mark.parametrize("temperature", [0.7] if INTERPRETED else [1.0, 0.7])
@pytest.mark.parametrize("vocab", [1, 7, 8, 1023, 1025, 5007])
def test_matches_float64(vocab: int, temperature: float, dtype: torch.dtype) -> None:
    """Fails if an output or the gradient is less accurate than float32 PyTorch allows."""
    check_logits(*make(9, vocab, dtype), temperature=temperature)


@pytest.mark.parametrize("vocab", [151_674, pytest.param(152_064, marks=slow_interpreted)])
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
    ids = torch.tensor([1, 2, 3])
    logprobs, entropy = logprobs_and_entropy(logits, ids)
    (torch.where(logprobs.isfinite(), logprobs, 0.0).sum() + entropy.sum()).backward()
    assert logprobs[1] == -math.inf and entropy[1] == 0
    assert selective_log_softmax(logits, ids)[1] == -math.inf
    assert entropy_from_logits(logits)[1] == 0
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
    ids = torch.tensor([1, 2, 3])
    logprobs, entropy = logprobs_and_entropy(logits, ids)
    for value in (
        logprobs, entropy, selective_log_softmax(logits, ids), entropy_from_logits(logits),
    ):  # fmt: skip
        assert value.isnan().tolist() == [False, True, False]
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
    if backend not in CPU_BACKENDS:
        logprobs, entropy = logprobs_and_entropy(logits, ids)
        assert logprobs.isnan().tolist() == [False, False, True, False]
        assert selective_log_softmax(logits, ids).isnan().tolist() == logprobs.isnan().tolist()
        assert entropy.isfinite().all()
        return
    for function in (logprobs_and_entropy, selective_log_softmax):
        with pytest.raises(ValueError, match=f"token_ids must be in .0, 50.*{label}"):
            function(logits, ids)


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
    if backend not in CPU_BACKENDS:
        pytest.skip("a device cannot raise without a synchronization; documented")
    with pytest.raises(ValueError, match="rows must"):
        entropy_from_logits(torch.randn(12, 5), rows=torch.tensor(rows))


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
    for index, function in ((0, lambda x: selective_log_softmax(x, ids)), (1, entropy_from_logits)):
        gradients = []
        for result in (lambda x, i=index: logprobs_and_entropy(x, ids)[i], function):
            x = logits.clone().requires_grad_()
            result(x).sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)


@pytest.mark.skipif(INTERPRETED, reason="float64 is the reference's")
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_gradcheck(temperature: float) -> None:
    """Fails if a gradient in closed form is not the derivative, with bans and labels -100."""
    logits = torch.randn(4, 9, dtype=torch.float64)
    ids, rows = torch.tensor([3, -100, 0, 6]), torch.tensor([2, 0, 1])
    options = dict(temperature=temperature, vocab_size=8, rows=rows)

    def function(free: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat([free, torch.full((4, 1), -math.inf, dtype=torch.float64)], 1).roll(2, 1)
        both = logprobs_and_entropy(x, ids, **options)
        more = selective_log_softmax(x, ids, **options), entropy_from_logits(x, **options)
        return *(value[:1] for value in both), *more

    assert torch.autograd.gradcheck(function, (logits[:, :8].clone().requires_grad_(),))


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


@pytest.mark.parametrize("vocab", [1000, pytest.param(9001, marks=slow_interpreted)])
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
    starts = [0, 8] if backend not in CPU_BACKENDS and vocab % 8 else [0, 3, 8, 13]
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


def test_a_gradient_in_another_dtype_is_rounded_once(backend: str) -> None:
    """Fails if the gradient of float32 logits is misplaced, or rounded twice, as bfloat16."""
    if backend not in ("triton", "cuda"):
        pytest.skip("the CPU kernels write the dtype they read")
    logits, ids = torch.randn(3, 4160)[:, :4101], torch.tensor([0, 4100, 2000])
    nowhere = torch.empty(0, dtype=torch.int64)
    labels = RowLabels(ids, None, 0.8, None, nowhere)
    saved, upstream = softmax_rows.forward(logits, labels)[2], torch.randn(3)
    single, wide = torch.empty(3, 4101), torch.full((3, 4160), 7.0, dtype=torch.bfloat16)
    softmax_rows.backward(logits, single, labels, saved, upstream)
    softmax_rows.backward(logits, wide[:, :4101], labels, saved, upstream)
    assert (wide[:, 4101:] == 7).all()
    ulp = 2.0**-7 if INTERPRETED else 2.0**-8  # the interpreter truncates
    assert ((wide[:, :4101].float() - single).abs() <= ulp * single.abs() + 1e-30).all()
