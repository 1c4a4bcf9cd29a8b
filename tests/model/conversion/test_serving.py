"""Folders that vLLM serves as they are, however they were written; vLLM itself is not needed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from r1v3.data.encoding import record_max_tiles
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.conversion import convert
from r1v3.model.conversion.serving import write_serving_files
from r1v3.rollout.weights import publish
from tests import tiny
from tests.served_folder import assert_served

ASSET = Path(__file__).parents[3] / "assets" / "tiny-internvl"


def saved(folder: Path, max_tiles: int = 1) -> None:
    """By the engine of transformers, as checkpoints and models of a run are."""
    net = tiny.model()
    record_max_tiles(net.config, max_tiles)
    folder.mkdir()
    HFEngine(net, tiny.tokenizer(), modules={}).save(folder)


def published(folder: Path) -> None:
    """For a server, from a folder that has nothing of this."""
    bare = folder.with_name("bare")
    saved(bare, 6)
    for file in bare.glob("*processor_config.json"):
        file.unlink()
    for name, key in (("config", "architectures"), ("tokenizer_config", "video_token")):
        document = json.loads((bare / f"{name}.json").read_text())
        del document[key]
        (bare / f"{name}.json").write_text(json.dumps(document))
    publish(folder.with_name("weights"), bare, tiny.model().named_parameters(), 1)
    folder.symlink_to(folder.with_name("weights") / "current")


def converted(folder: Path) -> None:
    """From the original layout, whose preprocessor_config.json is CLIP's."""
    native, original = folder.with_name("native"), folder.with_name("original")
    saved(native, 3)
    convert(native, original, "original")
    (original / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "crop_size": 448, "size": 448})
    )
    convert(original, folder, "native")


def shipped(folder: Path) -> None:
    shutil.copytree(ASSET, folder, copy_function=shutil.copyfile)


@pytest.mark.parametrize(
    ("write", "max_tiles"),
    [(saved, 1), (published, 6), (converted, 3), (shipped, 1)],
    ids=["saved", "published", "converted", "shipped"],
)
def test_vllm_can_serve_it(write: Callable[[Path], None], max_tiles: int, tmp_path: Path) -> None:
    """Fails if vLLM would take the folder for an embedding model, would not find a processor or
    the tokens of pictures, would cut or normalize pictures otherwise than training does, or could
    not read the weights under another user."""
    previous = os.umask(0o022)
    try:
        write(tmp_path / "model")
    finally:
        os.umask(previous)
    assert_served(tmp_path / "model", max_tiles=max_tiles)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o644}


def test_a_tokenizer_without_such_tokens_stays_as_it_is(tmp_path: Path) -> None:
    """Fails if a token that the vocabulary does not have is named: loading it would add one."""
    saved(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    document = json.loads(file.read_text())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<quad>"]
    file.write_text(json.dumps(document))
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text("{}")
    write_serving_files(tmp_path / "model")
    assert config.read_text() == "{}"
