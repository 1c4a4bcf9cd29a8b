"""The stages' files of the studies that are written by hand."""

from pathlib import Path

import pytest
import yaml

from tests.study.written import CONFIGS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the stages' files."""
    monkeypatch.chdir(tmp_path)
    for name, tree in CONFIGS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path
