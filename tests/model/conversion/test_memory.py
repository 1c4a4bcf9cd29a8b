"""A checkpoint of the 38B's real size, its values holes in the files, within bounded memory.

The folder has all tensors of InternVL3-38B in the original layout, 77 GB in 16 shards, of which
only the language model's head and one QKV hold data on disk; the rest are holes, which the
conversion keeps as holes. So every name, shape and offset beyond 4 GiB is real, and the values that
are read and compared are those two tensors'.
"""

import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from r1v3.model.conversion import native_shapes, weights
from tests.model.conversion.test_table import config_of_the_38b
from tests.processes import PATIENCE

HEAD, QKV = "language_model.lm_head.weight", "vision_model.encoder.layers.7.attn.qkv.weight"
DATA_BYTES = 64 << 20
MEBIBYTE = 1 << 20

# Run in a process of its own, because the peak is that of a whole life.
CHILD = """
import resource, sys, torch, zlib
from r1v3.model.conversion import Checkpoint, convert, load_config, weights
from r1v3.model.conversion.match import require_match
from r1v3.model.megatron.hf_weights import fill

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

source, target = sys.argv[1:]
torch.ones(1).bfloat16()
before = peak()
done = convert(source, target, "native")
converted = peak()
table = {weight.megatron: weight for weight in weights(load_config(target))}
names = ["language_model.output_layer.weight", "vision_model.conv1.weight"] + [
    name for name in table if ".decoder.layers.7." in name
]
with Checkpoint(target) as checkpoint:
    sources, _ = require_match(checkpoint, list(table.values()))
    for name in names:
        weight = table[name]
        shape = list(weight.shapes[0])
        if weight.split is not None:
            whole = sum(shape[weight.split] for shape in weight.shapes)
            if weight.padded:
                whole = 151680 if whole == 151674 else whole // 25 * 32
            shape[weight.split] = whole // 8
        shard = torch.empty(shape, dtype=torch.bfloat16)
        fill(shard, weight, sources, checkpoint, tensor_parallel=8, rank=0)
        if name == names[0]:
            print("head", zlib.crc32(shard.view(torch.uint8).numpy()))
print("tensors", done.tensors)
print("bytes", done.bytes)
print("before", before)
print("converted", converted)
print("filled", peak())
"""


def pattern(size: int) -> bytes:
    return bytes(range(1, 252)) * (size // 251) + bytes(size % 251)


def write_sparse(folder: Path) -> None:
    """All tensors in shards of 5 GB: a header, two tensors' data, and holes."""
    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights(config_of_the_38b()):
        for part, shape in enumerate(weight.shapes):
            name, row = weight.original_of(part)
            shapes[name] = (row + shape[0], *shape[1:])
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(math.prod, [*shards[-1].values(), shape])) > 5e9:
            shards.append({})
        shards[-1][name] = shape
    placed = {}
    for number, shard in enumerate(shards):
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            placed[name], offset = f"model-{number}.safetensors", end
        text = json.dumps(header).encode()
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
            for name in {HEAD, QKV} & set(shard):
                begin, end = header[name]["data_offsets"]
                file.seek(8 + len(text) + begin)
                file.write(pattern(min(end - begin, DATA_BYTES)))
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "ps_version": "v2",
        "image_token_id": 151667,
        "vision_config": {"image_size": 448, "num_hidden_layers": 45},
        "llm_config": {
            "model_type": "qwen2",
            "hidden_size": 5120,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "intermediate_size": 27648,
            "vocab_size": 151674,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def keeps_holes(folder: Path) -> bool:
    with open(folder / "probe", "wb") as file:
        file.truncate(1 << 30)
    with open(folder / "probe", "rb") as file:
        try:
            found = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError:
            found = 1 << 30
    return found == 1 << 30 and os.stat(folder / "probe").st_blocks < 2048


def read(folder: Path, name: str, begin: int, size: int) -> bytes:
    """Bytes of a tensor, by a reading of the format of its own."""
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with open(folder / placed[name], "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        file.seek(8 + length + entry["data_offsets"][0] + begin)
        return file.read(size)


def test_the_38b_converts_and_shards_in_bounded_memory(tmp_path: Path) -> None:
    """Fails if converting, or filling a rank's shards, needs memory that grows with the model.

    Less than 4 GB is what the project promises.
    """
    if not keeps_holes(tmp_path):
        pytest.skip("this file system keeps no holes; the test would need 154 GB")
    write_sparse(tmp_path / "source")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "source"), str(tmp_path / "target")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    told = {key: int(value) for key, value in (line.split() for line in child.stdout.splitlines())}
    assert told["tensors"] == 1456 == len(native_shapes(config_of_the_38b()))
    assert told["bytes"] == 2 * 38_388_164_992
    files = list((tmp_path / "target").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > told["bytes"]
    assert told["converted"] - told["before"] < 128, told  # buffers of 16 MiB
    assert told["filled"] - told["before"] < 500, told  # one shard of the head, and one block
    assert told["filled"] < 2000, told  # most of it torch and transformers themselves
    third = 2 * 3200 * 3200
    stacked = pattern(3 * third)
    for number, letter in enumerate("qkv"):
        name = f"vision_tower.encoder.layer.7.attention.{letter}_proj.weight"
        assert read(tmp_path / "target", name, 0, third) == stacked[number * third :][:third]
    data = pattern(DATA_BYTES)
    assert read(tmp_path / "target", HEAD, 0, DATA_BYTES) == data
    assert set(read(tmp_path / "target", HEAD, DATA_BYTES, MEBIBYTE)) == {0}
    shard_bytes = 151680 // 8 * 5120 * 2
    expected = zlib.crc32(data.ljust(shard_bytes, bytes(1)))
    assert told["head"] == expected
