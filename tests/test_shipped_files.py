"""Configs and the base model are found outside the repository too."""

import shutil
from pathlib import Path

import pytest

from r1v3 import shipped_files
from r1v3.config import SFT, STAGES, load
from r1v3.shipped_files import own_file, shipped

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["checkout", "wheel"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds configs/ and assets/; the current folder is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if request.param == "checkout":
        return ROOT
    package = tmp_path / "site-packages" / "r1v3"
    shutil.copytree(ROOT / "configs", package / "shipped" / "configs")
    (package / "shipped" / "assets" / "tiny-internvl").mkdir(parents=True)
    monkeypatch.setattr(shipped_files, "_FOLDERS", (package / "shipped", package.parent))
    return package / "shipped"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_the_demo_loads_anywhere(stage: str, root: Path) -> None:
    """Fails if `r1v3 sft configs/demo/sft.yaml` works in the repository alone."""
    loaded = load(STAGES[stage], f"configs/demo/{stage}.yaml", ["run=runs/mine"])
    assert loaded.run == Path("runs/mine")
    if stage == "sft":
        assert loaded.model == root / "assets" / "tiny-internvl"


@pytest.mark.parametrize(
    "path",
    [
        "configs/demo", "configs/demo/grpo.yaml", "configs/r1v3-38b", "configs/base/sft.yaml",
        "configs/r1v3-38b/grpo_8k.yaml", "configs", "assets", "assets/tiny-internvl",
        Path("configs/demo/select.yaml"), Path("configs/demo/../demo/eval.yaml"),
    ],
)  # fmt: skip
def test_what_came_with_r1v3_is_found(path: str | Path, root: Path) -> None:
    """Fails if a path of the README leads nowhere outside the repository."""
    assert shipped(path) == root / path and shipped(path).exists()


@pytest.mark.parametrize(
    "path",
    [
        "runs/demo-1", "config/demo", "configs/mine", "assets/mine", "/configs/demo", "", ".",
        "mine/configs/demo", "../configs/demo", "constraints.txt", "r1v3/cli.py", "configsdemo",
    ],
)  # fmt: skip
def test_other_paths_stay_as_they_are(path: str, root: Path) -> None:
    """Fails if a misspelled or foreign path is looked for in r1v3, and its error names that."""
    assert shipped(path) == Path(path)


def test_the_current_folder_comes_first(root: Path) -> None:
    """Fails if a user's own configs/demo/sft.yaml is ignored."""
    own = Path("configs/demo/sft.yaml")
    own.parent.mkdir(parents=True)
    text = (root / own).read_text(encoding="utf-8")
    own.write_text(text.replace("epochs: 2", "epochs: 7"), encoding="utf-8")
    assert shipped(own) == own
    assert load(SFT, own, ["run=runs/mine"]).epochs == 7
    assert load(SFT, root / own, ["run=runs/mine"]).epochs == 2


def test_a_missing_file_is_named_where_it_would_be(root: Path) -> None:
    """Fails if a file that was left out of a wheel is looked for in the current folder."""
    assert own_file("no-such-file").name == "no-such-file"
    assert not own_file("no-such-file").exists() and own_file("no-such-file").is_absolute()
