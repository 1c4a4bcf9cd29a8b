"""Seeds, and silence from the stacks."""

import os
import warnings

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton and inductor want a compiler and minutes; every stack has an eager form of the same.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore", category=DeprecationWarning)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, alone or in any order."""
    torch.manual_seed(0)
