"""Conversion on disk: bit for bit, loadable by transformers, all or nothing."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration
from typer.testing import CliRunner

from r1v3.cli import app
from r1v3.model.conversion import CheckpointError, convert
from r1v3.model.conversion.reader import read_header
from r1v3.model.conversion.writer import Entry, ShardWriter
from r1v3.model.internvl import load_model
from tests.model.conversion.checkpoints import (
    IMAGE_TOKEN_ID,
    original_tensors,
    parameters_of,
    tiny_model,
    write_native,
    write_original,
)


@pytest.fixture(scope="module")
def net() -> InternVLForConditionalGeneration:
    return tiny_model()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor, as safetensors itself reads the files."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert name not in found
            found[name] = tensor
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def logits(net: InternVLForConditionalGeneration) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 499, (1, 9), generator=generator)
    ids[0, 2:6] = IMAGE_TOKEN_ID
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return net(input_ids=ids, pixel_values=pixels, use_cache=False).logits


def test_native_to_original_and_back(net: InternVLForConditionalGeneration, tmp_path: Path) -> None:
    """Fails if a bit, a name, or the stacking of q, k and v is not what the other layout has."""
    source = write_native(net, tmp_path / "source")
    done = convert(source, tmp_path / "original", "original", max_shard_bytes=20_000)
    assert_same(tensors_of(tmp_path / "original"), original_tensors(parameters_of(net)))
    assert done.tensors == 75 and len(done.files) > 5
    assert "trust_remote_code" in done.notes[0]
    convert(tmp_path / "original", tmp_path / "back", "native")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


def test_original_to_native_loads_in_transformers_with_the_same_logits(
    net: InternVLForConditionalGeneration, tmp_path: Path
) -> None:
    """Fails if transformers misses a tensor, re-initializes one, or builds another model."""
    source = write_original(net, tmp_path / "source")
    convert(source, tmp_path / "native", "native", max_shard_bytes=20_000)
    loaded, info = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "native", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert_same(parameters_of(loaded), parameters_of(net))
    assert torch.equal(logits(loaded.eval()), logits(net))
    convert(tmp_path / "native", tmp_path / "back", "original")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    config = json.loads((tmp_path / "back/config.json").read_text())
    expected = json.loads((source / "config.json").read_text())
    expected.pop("image_token_id")
    assert config == expected


def test_every_layout_loads_as_it_is(net: InternVLForConditionalGeneration, tmp_path: Path) -> None:
    """Fails if HFEngine needs a conversion first, or the parameters' own names are not read."""
    own = tmp_path / "own"
    own.mkdir()
    save_file(parameters_of(net), own / "model.safetensors", metadata={"format": "pt"})
    net.config.save_pretrained(own)
    for folder in (
        own,
        write_native(net, tmp_path / "native"),
        write_original(net, tmp_path / "original"),
    ):
        assert_same(parameters_of(load_model(folder)), parameters_of(net))
    automatic = AutoModelForImageTextToText.from_pretrained(own, dtype=torch.float32)
    assert_same(parameters_of(automatic), parameters_of(net))


def test_half_precision_is_copied_and_other_files_come_along(
    net: InternVLForConditionalGeneration, tmp_path: Path
) -> None:
    """Fails if values pass through another dtype, or the tokenizer stays behind."""
    source = write_original(net, tmp_path / "source")
    halves = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    halves["language_model.model.norm.weight"] = torch.ones(32)  # kept in float32
    save_file(halves, source / "model.safetensors")
    for name in ("tokenizer.json", "modeling_skywork_chat.py", "pytorch_model.bin", ".hidden"):
        (source / name).write_text("{}")
    convert(source, tmp_path / "native", "native")
    found = tensors_of(tmp_path / "native")
    assert found.pop("language_model.model.norm.weight").dtype == torch.float32
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    files = {file.name for file in (tmp_path / "native").iterdir()}
    processors = {f"{name}processor_config.json" for name in ("", "pre", "video_pre")}
    assert files == {"config.json", "tokenizer.json", "model.safetensors"} | processors
    convert(source, tmp_path / "again", "original")
    assert_same(tensors_of(tmp_path / "again"), halves)
    assert (tmp_path / "again/modeling_skywork_chat.py").is_file()


def test_shards_and_index_are_those_of_the_format(
    net: InternVLForConditionalGeneration, tmp_path: Path
) -> None:
    """Fails if a shard is too large, unaligned, or the index does not describe the files."""
    convert(write_native(net, tmp_path / "a"), tmp_path / "b", "native", max_shard_bytes=9_000)
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    count = sum(parameter.numel() for parameter in net.parameters())
    assert index["metadata"] == {"total_parameters": count, "total_size": 4 * count}
    for file in (tmp_path / "b").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]
            assert sum(sizes) <= 9_000 or len(sizes) == 1
            assert all(index["weight_map"][name] == file.name for name in opened.keys())
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_values_of_mixed_widths_are_aligned(tmp_path: Path) -> None:
    """Fails if a float32 tensor begins at an odd half: readers that map the file cannot use it."""
    entries = [Entry("a", torch.float16, (5,)), Entry("b", torch.float32, (3,))]
    tensors = {"a": torch.randn(5).half(), "b": torch.randn(3)}
    with ShardWriter(tmp_path, entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert_same(tensors_of(tmp_path), tensors)
    header = read_header(tmp_path / "model.safetensors")
    assert all(stored.begin % stored.dtype.itemsize == 0 for stored in header.values())


def test_a_source_that_does_not_fit_leaves_nothing_behind(
    net: InternVLForConditionalGeneration, tmp_path: Path
) -> None:
    """Fails if half a checkpoint could be taken for a whole one."""
    source = write_original(net, tmp_path / "source")
    tensors = tensors_of(source)
    tensors.pop("mlp1.0.bias")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: model.multi_modal_projector.layer_norm"):
        convert(source, tmp_path / "target", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing_behind(
    net: InternVLForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a conversion that broke off leaves its temporary folder."""
    source = write_native(net, tmp_path / "source")
    genuine, calls = os.pwrite, []

    def full(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "target", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_target_that_exists_is_kept(
    net: InternVLForConditionalGeneration, tmp_path: Path
) -> None:
    """Fails if a conversion can overwrite a model."""
    source = write_native(net, tmp_path / "source")
    (tmp_path / "target").mkdir()
    convert(source, tmp_path / "target", "native")  # empty: may be used
    before = tensors_of(tmp_path / "target")
    with pytest.raises(FileExistsError, match="target exists; remove it"):
        convert(source, tmp_path / "target", "original")
    assert_same(tensors_of(tmp_path / "target"), before)


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    """Fails if an incomplete or altered checkpoint gets an index."""
    entries = [Entry("a", torch.float32, (2, 3)), Entry("b", torch.float16, (5,))]
    with pytest.raises(ValueError, match="a is torch.float64"):
        with ShardWriter(tmp_path, entries) as writer:
            writer.write("a", torch.zeros(2, 3).double())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="1 tensors were not written, such as b"):
        with ShardWriter(tmp_path, entries) as writer:
            writer.write("a", torch.zeros(2, 3))
            with pytest.raises(ValueError, match="a was written before"):
                writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="same name"):
        ShardWriter(tmp_path, [entries[0]] * 2)
    with pytest.raises(ValueError, match="must be positive, not 0 bytes"):
        ShardWriter(tmp_path, entries, 0)


def test_the_command_converts_and_says_what_is_wrong(
    net: InternVLForConditionalGeneration, tmp_path: Path
) -> None:
    """Fails if the verb is not wired up, or an error reaches the user as a traceback."""
    source = write_original(net, tmp_path / "source")
    verb = ["convert", str(source), str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*verb, "--to", "native", "--max-shard-size", "20KB"])
    assert done.exit_code == 0, done.output
    assert "79 tensors" in done.output and "weight files: " in done.output
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    for arguments, told in (
        (["--to", "native"], "exists; remove it"),
        (["--to", "native", "--max-shard-size", "3 apples"], "'3 apples' is no size"),
    ):
        failed = CliRunner().invoke(app, [*verb, *arguments])
        assert failed.exit_code == 1 and told in failed.output
