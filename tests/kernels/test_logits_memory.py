"""Logits of any layout and size, read where they are and overwritten only where that was asked."""
# mypy: disable-error-code="arg-type,union-attr,index"

import pytest
import torch
from torch import Tensor

from r1v3.kernels import logprobs_and_entropy, reference

pytestmark = pytest.mark.usefixtures("backend")


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (4 * torch.randn(rows, vocab)).to(dtype), torch.randint(0, vocab, (rows,))


def layouts() -> dict[str, Tensor]:
    x = torch.randn(4, 6, 5, 101)
    return {
        "one row": x[0, 0, 0],
        "shifted": x[0][:, :-1],
        "shifted batch": x[0, 1:, 1:],
        "transposed": x[0].transpose(0, 1),
        "four dimensions": x[:2, :3, 1:],
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


def test_strided_labels_and_rows() -> None:
    """Fails if labels or rows that are a view with a stride, or expanded, are read as if dense."""
    logits, ids = make(8, 40)
    rows = torch.tensor([6, 1, 0, 3, 5, 2])
    for labels, chosen in (
        (ids.repeat_interleave(2)[::2], None),
        (ids[:1].expand(8), None),
        (ids.repeat_interleave(2)[::2], rows[::2]),
    ):
        gradients = []
        for dense in (False, True):
            x = logits.clone().requires_grad_()
            picked = chosen if chosen is None or not dense else chosen.clone()
            outputs = logprobs_and_entropy(x, labels.clone() if dense else labels, rows=picked)
            outputs[0].sum().backward()
            gradients += [*outputs, x.grad]
        assert all(map(torch.equal, gradients[:3], gradients[3:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
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


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_more_than_two_to_the_31_elements_apart(inplace: bool) -> None:
    """Fails if the offset of a row, read or written, is computed in 32 bits."""
    logits = torch.empty(2**31 + 5_009, dtype=torch.bfloat16).as_strided((3, 5_007), (2**30 + 1, 1))
    dense, ids = make(3, 5_007, torch.bfloat16)
    gradients = []
    for x in (dense, logits.copy_(dense)):
        x.requires_grad_()
        outputs = logprobs_and_entropy(x, ids, inplace_backward=inplace and x is logits)
        sum(value.sum() for value in outputs).backward()
        gradients.append(x.grad)
    if inplace:
        assert torch.equal(logits.detach(), gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2**-7, atol=1e-6)
