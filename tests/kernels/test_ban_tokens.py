"""Banning tokens, on every implementation this process can run."""

import gc
import math

import pytest
import torch

from r1v3.kernels import ban_tokens_, logprobs_and_entropy

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bans_exactly_the_named_tokens(dtype: torch.dtype) -> None:
    """Fails if another element changes, or a banned one keeps probability."""
    logits = torch.randn(3, 1000).to(dtype)
    kept = logits.clone()
    ids = torch.tensor([0, 999, 5, 5, 77], dtype=torch.int32)
    assert ban_tokens_(logits, ids) is logits
    kept[:, ids.long()] = -math.inf
    assert torch.equal(logits, kept)
    ban_tokens_(logits, ids)
    assert torch.equal(logits, kept)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([5, 1, 2]))
    assert logprobs[0] == -math.inf and entropy.isfinite().all()


def test_only_enabled_rows() -> None:
    """Fails if NoWait silences a row that is not thinking."""
    logits = torch.zeros(2, 3, 8)
    enabled = torch.tensor([[1, 0, 1], [0, 0, 1]])
    ban_tokens_(logits, torch.tensor([2]), enabled=enabled)
    assert torch.equal(logits[..., 2] == -math.inf, enabled.bool())
    assert torch.equal((logits == -math.inf).sum(-1), enabled)


def test_shards_ban_their_own_columns() -> None:
    """Fails if an id of another shard hits a column here, or a huge one is out of bounds."""
    whole = torch.zeros(2, 10)
    ids = torch.tensor([0, 4, 5, 9, -1, 10**12])
    parts = [whole[:, :5].clone(), whole[:, 5:].clone()]
    for start, part in zip((0, 5), parts, strict=True):
        ban_tokens_(part, ids, vocab_start=start)
    ban_tokens_(whole, ids)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert (whole == -math.inf).sum() == 8


@pytest.mark.parametrize("cut", ["rows", "columns", "batch", "transposed", "one row"])
def test_any_layout(cut: str) -> None:
    """Fails if strided logits are written elsewhere, or a copy is written instead."""
    base = torch.randn(4, 6, 30)
    view = {
        "rows": base[0, 1:5],
        "columns": base[0, :, 2:20],
        "batch": base[:, :-1],
        "transposed": base.transpose(0, 1),
        "one row": base[2, 3],
    }[cut]
    expected = view.clone()
    expected[..., [3, 7]] = -math.inf
    ban_tokens_(view, torch.tensor([3, 7]))
    assert torch.equal(view, expected)
    assert (base == -math.inf).sum() == view[..., 0].numel() * 2


@pytest.mark.parametrize("vocab", [1, 7, 8, 1023, 1025, 151_674, 152_064])
def test_first_and_last_column_of_rows_far_apart(vocab: int) -> None:
    """Fails if the offset of a row is computed in 32 bits, or an end of it is taken for outside."""
    gc.collect()  # Triton's interpreter leaves its arguments in cycles, and these are gigabytes
    far = torch.empty(2**31 + 2 + vocab, dtype=torch.bfloat16)
    far = far.as_strided((3, vocab), (2**30 + 1, 1)).zero_()
    expected = torch.zeros(3, vocab)
    expected[:, [0, -1]] = -math.inf
    ban_tokens_(far, torch.tensor([vocab - 1, vocab, -1, 0]))
    assert torch.equal(far.float(), expected)


def test_more_ids_than_one_block() -> None:
    """Fails if only the first block of a long list is banned."""
    logits = torch.zeros(2, 5000)
    ids = torch.randperm(5000)[:700]
    ban_tokens_(logits, ids)
    assert torch.equal((logits == -math.inf).nonzero()[:, 1].view(2, -1)[0], ids.sort().values)


def test_nothing_to_ban() -> None:
    """Fails if empty ids or rows raise or change something."""
    logits = torch.randn(2, 5)
    assert torch.equal(ban_tokens_(logits.clone(), torch.zeros(0, dtype=torch.int64)), logits)
    assert ban_tokens_(torch.zeros(0, 5), torch.tensor([1])).shape == (0, 5)


def test_wrong_arguments_raise() -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    x = torch.randn(2, 5)
    cases = [
        (lambda: ban_tokens_(x, torch.tensor([1.0])), "token_ids must be integers"),
        (lambda: ban_tokens_(x, torch.tensor(1)), "token_ids must be integers"),
        (lambda: ban_tokens_(x.long(), torch.tensor([1])), "logits must be a floating-point"),
        (lambda: ban_tokens_(x, torch.tensor([1]), enabled=torch.ones(3)), "enabled must have"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
