"""Two servers that answer alike, and no second request for one that is merely slow."""

from collections.abc import Iterator

import pytest

from r1v3.rollout import server_pool
from tests.rollout.served import NET
from tests.rollout.speaking_server import SpeakingServer, serving


@pytest.fixture
def two() -> Iterator[list[SpeakingServer]]:
    with serving(NET, NET) as servers:
        yield servers


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests count requests; on a busy machine a true answer may take more than a second."""
    monkeypatch.setattr(server_pool, "LATE_SECONDS", 60.0)
