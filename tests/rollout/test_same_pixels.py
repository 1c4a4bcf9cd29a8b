"""Every sampler is given the pixels that the trainer trains on."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from r1v3.config import Pictures
from r1v3.data.encoding import encode_sample
from r1v3.data.images import tile_image
from r1v3.data.sample import make_sample
from r1v3.data.special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from r1v3.data.tiles import ImageShape
from r1v3.rollout.contract import Request, Sampling, TokenRules
from r1v3.rollout.vllm_colocated import ColocatedVLLM
from r1v3.rollout.vllm_protocol import chat_call, picture_name
from tests import tiny

WORDS = tiny.tokenizer()
RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (40, 70, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(NOISE, kind, exif=exif.tobytes())


def faded(mode: str, kind: str) -> bytes:
    image = NOISE.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encoded(image, kind)


PICTURES: dict[str, bytes] = {
    "plain": encoded(NOISE),
    "jpeg": encoded(NOISE, "JPEG"),
    "on its side": turned(6, "JPEG"),
    "mirrored": turned(2, "PNG"),
    "upside down": turned(3, "WEBP"),
    "alpha": faded("RGB", "PNG"),
    "gray alpha": faded("L", "PNG"),
    "alpha webp": faded("RGB", "WEBP"),
    "16 bits": encoded(Image.fromarray(RNG.integers(0, 2**16, (9, 9), dtype=np.uint16))),
    "floats": encoded(Image.fromarray(RNG.random((9, 9), dtype=np.float32)), "TIFF"),
    "palette": encoded(NOISE.quantize(7), "GIF", transparency=3),
    "cut": encoded(NOISE, "JPEG")[:-200],
}


def ask(data: bytes, pictures: Pictures) -> Request:
    sample = make_sample(
        question="What?", ground_truth="1", data_source="t", index=0, images=[data]
    )
    shape = ImageShape(tiny.IMAGE_SIZE, 3, tiny.TOKENS_PER_TILE, pictures=pictures)
    return Request(encode_sample(sample, WORDS, shape), sample, pictures=pictures)


def tiles(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    cut = tile_image(image, tile_size=tiny.IMAGE_SIZE, max_tiles=3)
    return np.stack([np.asarray(tile) for tile in cut])


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("ground", ["white", "black"])
def test_vllm_gets_the_pixels_of_the_trainer(kind: str, ground: Any) -> None:
    """Fails if completions are sampled for another picture than they are trained on."""
    pictures = Pictures(ground=ground, truncated="accept")
    request = ask(PICTURES[kind], pictures)
    rules = TokenRules.of(WORDS)
    call = chat_call(
        request, Sampling(), rules, count=1, max_tokens=4, seed=0, step=3, placeholder="<image>"
    )
    (part,) = (p for p in call.body["messages"][-1]["content"] if p["type"] == "image_url")
    sent = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    with Image.open(io.BytesIO(sent)) as served:
        assert served.format == "PNG" and not served.getexif() and "transparency" not in served.info
        assert np.array_equal(tiles(served.convert("RGB")), request.example.tiles)
    ids = [WORDS.convert_tokens_to_ids(mark) for mark in (IMAGE_START, IMAGE_CONTEXT, IMAGE_END)]
    sampler: Any = SimpleNamespace(_marks=tuple(ids), _placeholder=[7], _max_tiles=None, step=3)
    prompt = ColocatedVLLM._prompt(sampler, request, SimpleNamespace(token_ids=()))  # type: ignore[arg-type]
    (image,) = prompt["multi_modal_data"]["image"]
    assert np.array_equal(tiles(image), request.example.tiles)
    assert prompt["multi_modal_uuids"]["image"] == [part["uuid"]]


def test_a_picture_on_another_ground_has_another_name() -> None:
    """Fails if a server answers about the cached picture of a run with another ground."""
    data = PICTURES["alpha"]
    names = {picture_name(data, Pictures(ground=g), 1) for g in ("white", "black")}  # type: ignore[arg-type]
    assert len(names) == 2
