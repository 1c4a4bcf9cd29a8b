"""The pipeline's tests need the packages of the extra `distill`, which `make install` brings."""

import pytest

pytest.importorskip("py3langid")
pytest.importorskip("datasketch")
