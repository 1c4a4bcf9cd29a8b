"""Seeds, and silence from the stacks."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton and inductor want a compiler and minutes; every stack has an eager form of the same.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore", category=DeprecationWarning)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Megatron's groups of one process."""
    from megatron.core import mpu

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    yield
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
