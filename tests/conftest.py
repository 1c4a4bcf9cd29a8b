"""Seeds, threads and memory of a worker, the `gpu` marker, and a header with instruction sets."""

import os
import random
import resource

import numpy as np
import pytest
import torch

from r1v3.kernels import cpu
from tests.processes import MEMORY_LIMIT, ROOT, SESSION

# Folders and files whose tests take a minute or more.
FIRST = {"engine", "megatron", "trainer", "test_demo.py", "test_triton_interpreter.py"}

if not torch.cuda.is_available():
    # What grows without end then fails by name, before it takes the whole machine down with it.
    resource.setrlimit(
        resource.RLIMIT_DATA, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_DATA)[1])
    )
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail instead of skipping gpu tests without CUDA"
    )


def pytest_report_header() -> str:
    """Which of the compiled kernels' instruction sets this machine's tests run."""
    if not cpu.built():
        return "r1v3 cpu kernels: not built"
    first, *rest = cpu.capabilities()
    dot = ", pairs of bfloat16" if cpu.has_bfloat16_dot() else ""
    return f"r1v3 cpu kernels: {first}{dot} (also tested: {', '.join(rest) or 'nothing'})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that take long, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: FIRST.isdisjoint(item.path.relative_to(ROOT).parts))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail("--require-gpu was given and torch.cuda.is_available() is False")
    pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tell `processes.made_once` where all workers of this session can look."""
    folder = tmp_path_factory.getbasetemp()
    SESSION.folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
