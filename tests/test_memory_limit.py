"""The memory that a test may allocate."""

import pytest
import torch

from tests.processes import MEMORY_LIMIT


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA reserves addresses beyond any limit")
def test_no_process_of_the_tests_takes_the_machine_down() -> None:
    """Fails if a test that grows without end would be killed from outside and leave no name."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(MEMORY_LIMIT, dtype=torch.uint8)
    with pytest.raises(MemoryError):
        bytearray(MEMORY_LIMIT)
