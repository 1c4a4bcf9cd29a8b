"""The pipeline's tests need the packages of the extra `distill`, which `make install` brings."""

from collections.abc import Iterator

import pytest

pytest.importorskip("py3langid")
pytest.importorskip("datasketch")


@pytest.fixture(autouse=True, scope="session")
def no_figures() -> Iterator[None]:
    """A figure takes a second; tests/distill/test_page.py draws it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r1v3.distill.figure.distribution_figure", lambda account, file: None)
        yield
