import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import r1v3
from r1v3.trainer.checkpoint import (
    load_checkpoint,
)
from tests.trainer.checkpoints import names, save

REPOSITORY = Path(r1v3.__path__[0]).parent


def test_too_little_space_is_found_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate must hold the new tensors and, from the last checkpoint, the model."""

    def big_model(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"x" * 3_000_000)

    save(tmp_path, 1, write_model=big_model)
    usage = shutil.disk_usage(tmp_path)._replace(free=6_900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not enough free space for the checkpoint of step 2") as e:
        save(tmp_path, 2, tensors={"w": torch.zeros(1_000_000)}, write_model=pytest.fail)
    assert e.value.errno == errno.ENOSPC
    assert "needs 6.7 MiB, 6.6 MiB are free" in str(e.value) and str(tmp_path) in str(e.value)
    assert names(tmp_path) == ["step-000001"]


def test_the_first_checkpoint_is_refused_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a job that has no room for its checkpoints finds out while it writes the first."""
    usage = shutil.disk_usage(tmp_path)._replace(free=6_900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    settings = {"tensors": {"w": torch.zeros(1_000_000)}, "write_model": pytest.fail}
    with pytest.raises(OSError, match="needs 6.7 MiB, 6.6 MiB are free"):
        save(tmp_path, 1, model_bytes=3_000_000, **settings)
    assert names(tmp_path) == []


def test_a_write_that_fails_half_way_is_one_clear_error(tmp_path: Path) -> None:
    """RLIMIT_FSIZE ends a real write of safetensors as a full disk does (os error 27)."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="disk became full while saving .* step 2") as failure:
            save(tmp_path, 2, tensors={"w": torch.zeros(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert failure.value.errno == errno.ENOSPC and failure.value.__cause__ is not None
    assert names(tmp_path) == ["step-000001"]
    load_checkpoint(tmp_path / "step-000001")


FULL_DISK = """
    import json, os, subprocess, sys
    from pathlib import Path
    import torch
    from r1v3.trainer.checkpoint import load_checkpoint, start_checkpoint

    root = Path(sys.argv[1])
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        sys.exit(77)

    def write(file, data):
        file.write_bytes(data)

    def save(step, model_bytes, numbers):
        start_checkpoint(
            root, step, tensors={"w": torch.full((numbers,), 1.0 * step)}, state={},
            write_model=lambda d: write(d / "model.safetensors", b"x" * model_bytes),
        ).finish()

    save(1, 300_000, 100_000)
    results = []
    # Full in the engine's own write; in ours; found before writing.
    for model_bytes, numbers in ((9_000_000, 1000), (2_000_000, 600_000), (300_000, 2_000_000)):
        try:
            save(2, model_bytes, numbers)
            error = None
        except OSError as e:
            error = [e.errno, str(e), e.filename]
        free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
        results.append([error, os.listdir(root), free])
        assert torch.equal(load_checkpoint(root / "step-000001").tensors["w"], torch.ones(100_000))
    save(3, 300_000, 100_000)
    print(json.dumps(results))
"""


def test_a_full_disk_leaves_the_earlier_checkpoint_and_all_its_space(tmp_path: Path) -> None:
    """A real 4 MB file system in a mount namespace that ends with the process."""
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare program to mount a small file system with")
    finished = subprocess.run(
        ["unshare", "--mount", "--map-root-user", *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if finished.returncode == 77 or finished.stderr.startswith("unshare:"):
        pytest.skip("this machine does not let a test mount a tmpfs")
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert [result[0][0] for result in results] == [errno.ENOSPC] * 3
    assert [result[0][2] for result in results] == [str(tmp_path)] * 3
    for result in results[:2]:
        assert "the disk became full while saving the checkpoint of step 2" in result[0][1]
        assert "earlier checkpoints are intact" in result[0][1]
    assert "not enough free space" in results[2][0][1]
    for _, listing, free in results:
        assert listing == ["step-000001"] and free > 3_000_000


KILLS = """
    import os, random, signal, sys, time, warnings
    from pathlib import Path
    import torch
    from r1v3.trainer.checkpoint import load_latest, start_checkpoint

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    root, generator = Path(sys.argv[1]), random.Random(0)

    def write(file, data):
        file.write_bytes(data)

    def content(step):
        return bytes([step % 256]) * 300_000

    def save(step):
        start_checkpoint(
            root, step, tensors={"w": torch.full((100_000,), float(step))}, state={"n": [step]},
            write_model=lambda d: write(d / "model.safetensors", content(step)),
        ).finish()

    start = time.monotonic()
    save(1)
    save(1)
    one_save = (time.monotonic() - start) / 2
    last, in_the_middle = 1, 0
    for _ in range(16):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(last, last + 10_000):  # the first one replaces an existing checkpoint
                save(step)
                os.write(writer, b"s")
        os.close(writer)
        for _ in range(generator.randrange(3)):
            assert os.read(reader, 1) == b"s"
        time.sleep(generator.uniform(0, 1.2 * one_save))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(reader)
        in_the_middle += any(name.startswith(".") for name in os.listdir(root))
        loaded = load_latest(root)
        assert loaded.step >= last, (loaded.step, last)
        last = loaded.step
        assert loaded.state == {"n": [last]}
        assert torch.equal(loaded.tensors["w"], torch.full((100_000,), float(last)))
        model = (loaded.path / "model.safetensors").read_bytes()
        assert model == content(last)
    save(last + 1)
    assert len(os.listdir(root)) == 2, os.listdir(root)
    print(in_the_middle, last)
"""


def test_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    """Sixteen processes that save die by SIGKILL; no save may take a finished one back."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLS), str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    in_the_middle, last_step = map(int, finished.stdout.split())
    assert in_the_middle >= 3 and last_step > 3
