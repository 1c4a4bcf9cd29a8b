"""A batch of tokens for the tests of the policy loss."""

import torch
from torch import Tensor

AGGREGATIONS = ["sequence-mean", "token-mean", "sequence-sum", "constant"]


def random_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones, advantages [6] and mask [6, 1100], of which a row is 0."""
    logprobs = -3 * torch.rand(6, 1100, dtype=dtype)
    mask = torch.rand(6, 1100) < torch.tensor([0.9, 0.5, 0.0, 0.01, 1.0, 0.7])[:, None]
    old = logprobs + 0.3 * torch.randn(6, 1100, dtype=dtype)
    return logprobs, old, torch.randn(6, dtype=dtype), mask
