"""The compiled CPU kernel that bans tokens."""

import pytest
import torch
from torch import Tensor

from r1v3 import _C
from tests.kernels.compiled import DTYPES, each_dtype


def ban(
    logits: Tensor, ids: list[int], enabled: Tensor | None = None, vocab_start: int = 0
) -> Tensor:
    tokens = torch.tensor(ids, dtype=torch.int64)
    _C.ban_tokens(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        n_rows=logits.shape[0],
        row_stride=logits.stride(0),
        vocab=logits.shape[1],
        ids=tokens.data_ptr(),
        n_ids=len(ids),
        enabled=0 if enabled is None else enabled.data_ptr(),
        vocab_start=vocab_start,
    )
    return logits


@each_dtype
def test_bans_the_ids_of_this_shard_in_the_enabled_rows(dtype: torch.dtype) -> None:
    """Fails if another shard's id wraps into this one, or a disabled row or the padding changes."""
    storage = torch.randn(3, 16).to(dtype)
    expected = storage.clone()
    expected[0, 0] = expected[0, 9] = expected[2, 0] = expected[2, 9] = -torch.inf
    enabled = torch.tensor([1, 0, 1], dtype=torch.uint8)
    ban(storage[:, :10], [100, 109, 109, 99, 110, 0, -5, 2**40], enabled, vocab_start=100)
    assert torch.equal(storage, expected)


@each_dtype
def test_without_flags_every_row_is_enabled(dtype: torch.dtype) -> None:
    """Fails if an absent `enabled` is read."""
    logits = ban(torch.zeros(4, 7, dtype=dtype), [6])
    assert (logits[:, 6] == -torch.inf).all() and (logits[:, :6] == 0).all()
    ban(logits, [])
    assert (logits[:, :6] == 0).all()


def test_an_unknown_dtype_is_refused() -> None:
    """Fails if another element size is written as if it were float16."""
    with pytest.raises(ValueError, match="dtype must be 0 .*got 3"):
        _C.ban_tokens(0, 3, 0, 0, 0, 0, 0, 0, 0)
