"""Reading safetensors: slices against safetensors' own reader, and damage that is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1v3.model.conversion import Checkpoint, CheckpointError, match, weights
from r1v3.model.conversion import reader as reader_module
from r1v3.model.conversion.match import require_match
from r1v3.model.conversion.reader import DTYPES
from tests.model.conversion.checkpoints import tiny_config, tiny_model, write_native

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_native(tiny_model(), tmp_path_factory.mktemp("reader") / "model")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 30).to(dtype)


def test_every_dtype_and_an_odd_offset_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    """Fails if a dtype is misread, or values that do not begin at a multiple of their size."""
    tensors = {str(dtype): values(dtype, 5, 3) for dtype in DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "  # now of odd length
    header += b" " if len(header) % 2 == 0 else b""
    moved = len(header).to_bytes(8, "little") + header + content[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(moved)
    expected = load_file(tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for name, tensor in expected.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.double(), tensor.double()), name


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_slices_are_those_of_the_whole_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Fails if rows or columns are off by one, at any number of blocks, or not converted."""
    monkeypatch.setattr(reader_module, "_BLOCK_BYTES", block)
    whole = values(torch.bfloat16, 37, 11)
    save_file({"pad": torch.ones(3), "matrix": whole}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        for dim, start, length in ((0, 0, 37), (0, 5, 9), (1, 0, 11), (1, 3, 4), (0, 36, 1)):
            shape = [37, 11]
            shape[dim] = length
            target = torch.full(shape, torch.nan)
            checkpoint.copy_into(target, "matrix", dim=dim, start=start)
            assert torch.equal(target, whole.narrow(dim, start, length).float())
        strided = torch.zeros(9, 40)[:, ::2][:, :11]
        checkpoint.copy_into(strided, "matrix", start=5)
        assert torch.equal(strided, whole[5:14].float())


@pytest.mark.parametrize(
    ("shape", "dim", "start"),
    [
        ((5, 11), 0, 33),
        ((37, 4), 1, 8),
        ((37, 12), 0, 0),
        ((37,), 0, 0),
        ((37, 11), 2, 0),
        ((5, 11), 0, -1),
    ],
)
def test_a_slice_outside_the_tensor_is_refused(
    tmp_path: Path, shape: tuple[int, ...], dim: int, start: int
) -> None:
    """Fails if a neighboring tensor's values could be read."""
    save_file({"matrix": torch.ones(37, 11), "z": torch.ones(99)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match="matrix has shape"):
        checkpoint.copy_into(torch.empty(shape), "matrix", dim=dim, start=start)


@pytest.mark.parametrize("kept", [0, 5, 60, -1, -4000])
def test_a_shard_that_was_cut_short_is_named_with_its_sizes(folder: Path, kept: int) -> None:
    """Fails if a download that broke off would be loaded."""
    file = shards(folder)[1]
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"{file} cannot be read: ")
    assert str(file.stat().st_size) in message
    if kept < 0:
        assert str(size) in message and "is cut short" in message


def test_a_file_with_more_than_its_header_says_is_named(folder: Path) -> None:
    """Fails if a file that two programs wrote into would be loaded."""
    file = shards(folder)[0]
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read: it has ")):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}']
    + [b'{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}', b"\xff\xfe"],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: bytes) -> None:
    """Fails if nonsense is read as tensors, or ends in a KeyError."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read")):
        Checkpoint(tmp_path)


def test_missing_shards_are_named(folder: Path) -> None:
    """Fails if only the first of several missing files is told."""
    first, second = shards(folder)[:2]
    first.unlink()
    second.unlink()
    with pytest.raises(ValueError, match=f"2 are missing: {first.name}, {second.name}"):
        Checkpoint(folder)


def test_an_index_that_disagrees_with_its_shards_is_named(folder: Path) -> None:
    """Fails if an index of another checkpoint would be believed."""
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    name = "vision_tower.encoder.layer.0.lambda_1"  # one of several in its file
    first = folder / placed[name]
    second = next(file for file in shards(folder) if file != first)
    edit(folder / INDEX, lambda index: index["weight_map"].update({name: second.name}))
    with pytest.raises(ValueError, match=f"{second.name} has tensor {name}; it has not"):
        Checkpoint(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].pop(name))
    with pytest.raises(ValueError, match=f"{first.name} has tensor {name}, which .* not name"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_a_damaged_index_is_named(folder: Path, text: str) -> None:
    """Fails if a broken index ends in a traceback, or a shard outside the folder is opened."""
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} cannot be read"):
        Checkpoint(folder)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    """Fails if it is taken for an empty checkpoint."""
    with pytest.raises(ValueError, match="has no model.safetensors and no model.safetensors.index"):
        Checkpoint(tmp_path)


def test_all_faults_are_reported_at_once(folder: Path, tmp_path: Path) -> None:
    """Fails if the user has to repair a checkpoint one error message at a time."""
    tensors = {name: t for file in shards(folder) for name, t in load_file(file).items()}
    for file in [*shards(folder), folder / INDEX]:
        file.unlink()
    missing = [f"language_model.model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    for name in missing:
        tensors.pop(name)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(7)
    tensors["language_model.model.layers.0.mlp.up_proj.qweight"] = torch.zeros(2)
    tensors["language_model.model.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors")
    table = weights(tiny_config())
    with Checkpoint(folder) as checkpoint:
        _, report = match(checkpoint, table)
        with pytest.raises(CheckpointError) as caught:
            require_match(checkpoint, table)
    own = "model.language_model.layers."
    assert report.missing == [f"{own}{layer}.mlp.up_proj.weight" for layer in range(3)]
    assert report.unexpected == ["language_model.model.layers.0.mlp.up_proj.qweight"]
    assert report.ignored == ["language_model.model.rotary_emb.inv_freq"]
    file = str(folder / "model.safetensors")
    assert report.misshapen == [("multi_modal_projector.linear_1.bias", file, (32,), (7,))]
    assert caught.value.report == report
    message = str(caught.value)
    assert "3 missing, 1 unexpected and 1 misshapen" in message
    assert all(name in message for name in report.missing + report.unexpected)
    assert "linear_1.bias has shape (7,), config.json says (32,)" in message


def test_a_tied_head_that_was_saved_is_left_out(folder: Path) -> None:
    """Fails if a head beside a tied embedding is an error, or is taken for a weight."""
    config = tiny_config()
    config.tie_word_embeddings = True
    with Checkpoint(folder) as checkpoint:
        _, report = match(checkpoint, weights(config))
    assert report.ok and report.ignored == ["language_model.lm_head.weight"]


def test_a_long_report_is_cut_and_says_so(folder: Path) -> None:
    """Fails if the wrong configuration prints a thousand lines."""
    config = tiny_config(hidden_size=80)
    config.text_config.num_hidden_layers = 9
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError) as caught:
        require_match(checkpoint, weights(config))
    message = str(caught.value)
    assert "missing: and 60 more" in message and len(message.splitlines()) < 32
