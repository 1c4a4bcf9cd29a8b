"""Two servers that answer alike."""

from collections.abc import Iterator

import pytest

from tests.rollout.served import NET
from tests.rollout.speaking_server import SpeakingServer, serving


@pytest.fixture
def two() -> Iterator[list[SpeakingServer]]:
    with serving(NET, NET) as servers:
        yield servers
