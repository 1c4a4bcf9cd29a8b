import json
import os
import random
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

import r1v3
from r1v3.files import FileDigest, HashedFile, digest_of
from r1v3.trainer.checkpoint import (
    CheckpointError,
    is_model_only,
    load_checkpoint,
    load_latest,
    model_files,
    remove_old,
)
from tests.trainer.checkpoints import names, save

REPOSITORY = Path(r1v3.__path__[0]).parent


def latest_path(root: Path) -> Path | None:
    loaded = load_latest(root)
    return None if loaded is None else loaded.path


def test_what_was_saved_is_loaded_and_the_model_files_lie_beside_it(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "seed": 2**70,
        "best": None,
        "losses": [0.1 + 0.2, 1e-310],
        "done": False,
        "n": {},
    }
    path = save(tmp_path / "new" / "root", 40, state=state)
    assert path == tmp_path / "new" / "root" / "step-000040"
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state, loaded.path) == (40, state, path)
    assert torch.equal(loaded.tensors["moment"], torch.full((300,), 40.0))
    assert torch.equal(load_file(path / "model.safetensors")["weight"], torch.arange(12.0))
    assert json.loads((path / "config.json").read_text()) == {"model_type": "internvl"}
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == {
        "config.json",
        "model.safetensors",
        "tokenizer/vocab.json",
        "trainer.json",
        "trainer.safetensors",
    }


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """safetensors refuses strided and shared tensors, so saving them as they are would fail."""
    base = torch.randn(6, 8)
    tensors = {
        "transposed": base.t(),
        "row": base[2],
        "same": base,
        "alias": base,
        "expanded": torch.tensor([1.5]).expand(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "empty2": torch.empty(0, 4),
        "bfloat16": torch.randn(7).to(torch.bfloat16),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "bool": torch.tensor([True, False]),
        "rng": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    loaded = load_checkpoint(save(tmp_path, 1, tensors=tensors)).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), expected), name


def test_loaded_tensors_own_aligned_memory(tmp_path: Path) -> None:
    """A view into the mapped file would be unaligned for the CPU kernels and die with the file."""
    path = save(tmp_path, 1, tensors={"odd": torch.ones(3, dtype=torch.uint8), "w": torch.ones(99)})
    loaded = load_checkpoint(path).tensors
    os.truncate(path / "trainer.safetensors", 0)
    shutil.rmtree(path)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())
    assert torch.equal(loaded["w"], torch.ones(99))
    loaded["w"].add_(1)


def test_checkpoint_files_obey_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()} == {0o644}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def become_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


ALL_FILES = ["model.safetensors", "tokenizer/vocab.json", "trainer.safetensors", "trainer.json"]


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"is missing \(expected \d+ bytes, sha256 [0-9a-f]{64}\)"),
        (become_directory, "is missing"),
        (cut, r"has \d+ bytes, expected \d+"),
        (flip, r"is altered: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"),
    ],
)
def test_a_damaged_file_is_named_with_what_was_expected_and_found(
    tmp_path: Path, name: str, damage: Any, message: str
) -> None:
    path = save(tmp_path, 3)
    damage(path / name)
    with pytest.raises(CheckpointError, match=re.escape(str(path / name)) + " " + message):
        load_checkpoint(path)


def edit_manifest(path: Path, **changes: Any) -> None:
    document = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "has format 'other'"),
        ({"step": 4}, "is altered: step is 4, expected 3"),
        ({"step": "3"}, "is not a manifest"),
        ({"files": {}}, "is not a manifest"),
        ({"files": []}, "is not a manifest"),
        ({"files": {"trainer.json": 3}}, "is not a manifest"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path, 3)
    edit_manifest(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json " + message):
        load_checkpoint(path)


@pytest.mark.parametrize("outside", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_cannot_make_us_read_outside_of_the_checkpoint(
    tmp_path: Path, outside: str
) -> None:
    path = save(tmp_path, 3)
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit_manifest(path, files={**files, outside: {"size": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        load_checkpoint(path)


def test_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_checkpoint(tmp_path / "step-000099")


def test_no_single_changed_byte_changes_what_is_loaded(tmp_path: Path) -> None:
    """Any byte of any file: loading fails with CheckpointError or gives what was saved."""
    path = save(tmp_path, 3)
    generator = random.Random(0)
    refused = 0
    for file in sorted(path.rglob("*.*")):
        content = file.read_bytes()
        positions = generator.sample(range(len(content)), min(60, len(content)))
        for position in positions:
            changed = bytearray(content)
            changed[position] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            try:
                loaded = load_checkpoint(path)
            except CheckpointError:
                refused += 1
            else:
                assert file.name == "manifest.json"
                assert (loaded.step, loaded.state) == (3, {"seed": 7, "step": 3})
        file.write_bytes(content)
    assert refused > 200
    load_checkpoint(path)


def test_latest_skips_broken_checkpoints_with_a_warning_that_names_them(tmp_path: Path) -> None:
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep=None)
    for other in ("best", "step-abc", ".step-000050.0123.tmp", "step-7"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-000077").write_text("a file")
    assert latest_path(tmp_path) == tmp_path / "step-1000000"
    cut(tmp_path / "step-1000000" / "model.safetensors")
    (tmp_path / "step-999999" / "manifest.json").unlink()
    with pytest.warns(UserWarning) as caught:
        assert latest_path(tmp_path) == tmp_path / "step-000010"
    messages = [str(warning.message) for warning in caught]
    assert "step-1000000 is broken" in messages[0] and "model.safetensors has" in messages[0]
    assert "step-999999 is broken" in messages[1]
    assert len(messages) == 2


def test_what_was_hashed_while_it_was_written_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a checkpoint's files are read twice: after they were written, or to resume."""
    read: list[str] = []

    def reading(file: Path) -> FileDigest:
        read.append(file.name)
        return digest_of(file)

    class Written:
        digests: ClassVar[dict[str, FileDigest]] = {}

        def done(self) -> bool:
            return True

        def wait(self) -> None:
            pass

    def write_model(directory: Path) -> Written:
        with HashedFile(directory / "model.safetensors") as file:
            file.write(b"weights")
        Written.digests["model.safetensors"] = file.digest
        return Written()

    monkeypatch.setattr("r1v3.trainer.checkpoint.digest_of", reading)
    save(tmp_path, 1, write_model=write_model)
    assert sorted(read) == ["trainer.json", "trainer.safetensors"]
    read.clear()
    assert latest_path(tmp_path) == tmp_path / "step-000001"
    assert sorted(read) == ["model.safetensors", "trainer.json", "trainer.safetensors"]


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") is None
    assert load_latest(tmp_path) is None


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(directory: Path) -> None:
        seen.append([name for name in names(tmp_path) if name.startswith("step")])

    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, keep=2, write_model=look)
    assert seen[-1] == ["step-000030", "step-000040"]
    assert names(tmp_path) == ["step-000040", "step-000050"]
    save(tmp_path, 60, keep=None)
    assert len(names(tmp_path)) == 3
    save(tmp_path, 70, keep=1)
    assert names(tmp_path) == ["step-000070"]


@pytest.mark.parametrize(
    ("keep", "keep_models", "whole", "models"),
    [
        (2, None, [40, 50], [10, 20, 30]),
        (2, 1, [40, 50], [30]),
        (1, 2, [50], [30, 40]),
        (1, 0, [50], []),
        (9, 0, [10, 20, 30, 40, 50], []),
    ],
)
def test_of_older_checkpoints_only_the_models_stay(
    tmp_path: Path, keep: int, keep_models: int | None, whole: list[int], models: list[int]
) -> None:
    """Fails if a run fills its disk with optimizer states, loses a model that selection may want,
    or takes a folder without an optimizer for one to resume from."""
    for step in (10, 20, 30, 40, 50):
        path = save(tmp_path, step, keep=keep, keep_models=keep_models)
        model = (path / "model.safetensors").read_bytes()
    assert names(tmp_path) == sorted(f"step-{step:06d}" for step in whole + models)
    for step in models:
        left = tmp_path / f"step-{step:06d}"
        assert is_model_only(left) and names(left) == [
            "config.json",
            "manifest.json",
            "model.safetensors",
        ]
        assert (left / "model.safetensors").read_bytes() == model
        assert {file.name for file in model_files(left)} == {"config.json", "model.safetensors"}
        with pytest.raises(CheckpointError, match="holds only its model"):
            load_checkpoint(left)
    assert latest_path(tmp_path) == tmp_path / "step-000050"
    assert [load_checkpoint(tmp_path / f"step-{step:06d}").step for step in whole] == whole
    # With all whole ones gone, there is nothing to resume from, and nobody is warned of damage.
    for step in whole:
        shutil.rmtree(tmp_path / f"step-{step:06d}")
    assert load_latest(tmp_path) is None


def test_a_reduction_that_is_killed_loses_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the old checkpoint is gone before its model stands in its place, or where links
    are not possible."""
    save(tmp_path, 10)
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links")))
    with monkeypatch.context() as killed:
        killed.setattr(
            "r1v3.trainer.checkpoint.replace_directory",
            lambda *names: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            remove_old(tmp_path, 20, 1, None)
    assert load_checkpoint(tmp_path / "step-000010").step == 10
    remove_old(tmp_path, 20, 1, None)
    assert is_model_only(tmp_path / "step-000010")


def test_a_broken_checkpoint_does_not_count_as_one_to_keep(tmp_path: Path) -> None:
    """keep=2 with the newer of two broken must not delete the last good one but the new."""
    save(tmp_path, 10)
    cut(save(tmp_path, 20) / "model.safetensors")
    save(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step-000010", "step-000020", "step-000030"]


def test_the_new_checkpoint_stays_when_later_steps_exist(tmp_path: Path) -> None:
    for step in (40, 50):
        save(tmp_path, step, keep=None)
    save(tmp_path, 10, keep=2)
    assert names(tmp_path) == ["step-000010", "step-000050"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    flip(save(tmp_path, 5) / "model.safetensors")
    path = save(tmp_path, 5, state={"second": True})
    assert load_checkpoint(path).state == {"second": True}
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.skipif(sys.platform != "linux", reason="swapping directories is a Linux system call")
def test_a_step_saved_again_is_there_at_every_moment(tmp_path: Path) -> None:
    """Deleting the old one first would lose the only checkpoint to a kill in between."""
    path = save(tmp_path, 5)
    missing: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if not os.path.exists(path / "manifest.json"):
                missing.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(8):
            save(tmp_path, 5)
    finally:
        done.set()
        reader.join()
    assert not missing


def test_leftovers_of_killed_saves_are_removed_by_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-000004.0123456789ab.tmp"
    (leftover / "deep").mkdir(parents=True)
    (leftover / "deep" / "model.safetensors").write_text("half")
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("error", [RuntimeError("engine"), KeyboardInterrupt()])
def test_a_failing_engine_leaves_no_trace(tmp_path: Path, error: BaseException) -> None:
    save(tmp_path, 5)

    def fail(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        save(tmp_path, 6, write_model=fail)
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": -1}, "step must be >= 0 .* got -1 and 2"),
        ({"keep": 0}, "keep >= 1 or None, got 1 and 0"),
        ({"state": {"best": float("inf")}}, r"state\.best is inf"),
        ({"state": {"a": [1, {"b": float("nan")}]}}, r"state\.a\[1\]\.b is nan"),
        ({"state": {"a": {3: 1}}}, r"state\.a has the key 3"),
        ({"state": {"a": torch.ones(1)}}, r"state\.a is tensor.*`tensors`"),
        ({"state": {"a": {1, 2}}}, r"state\.a is \{1, 2\}"),
    ],
)
def test_what_json_would_change_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """inf silently saved as null would make a resumed run differ from an uninterrupted one."""
    with pytest.raises(ValueError, match=message):
        save(tmp_path, **{"step": 1, **options})
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["manifest.json", "trainer.json", "trainer.safetensors"])
def test_the_engine_may_not_write_our_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"write_model wrote {name}"):
        save(tmp_path, 1, write_model=lambda directory: (directory / name).write_text("x"))
    assert names(tmp_path) == []


def test_saving_and_loading_give_no_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(save(tmp_path, 1))
        assert latest_path(tmp_path) == tmp_path / "step-000001"
