"""One server of the demo's base model for the tests of a file."""

from collections.abc import Iterator

import pytest

from tests.serve.serving import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(rows=8, queue=64) as one:
        yield one
