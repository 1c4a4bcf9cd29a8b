"""Tiles are counted from headers, cut when they are needed, and the same as if cut at once."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r1v3.config import Pictures
from r1v3.data.encoding import encode_all, encode_sample
from r1v3.data.images import (
    TruncatedImage,
    load_image,
    tile_image,
    upright_size,
    verify_image,
)
from r1v3.data.sample import Sample, make_sample
from r1v3.data.tiles import ImageShape, PictureTiles, TileCache
from tests import tiny

SHAPE = ImageShape(32, 12, 4)
PLAIN = Image.effect_noise((97, 61), 60).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def chunk_behind_pixels(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG file with one more chunk in front of its end; PIL checks no sum of such a chunk."""
    chunk = struct.pack(">I", len(content)) + kind + content
    chunk += struct.pack(">I", zlib.crc32(kind + content))
    return data[:-12] + chunk + data[-12:]


def files() -> dict[str, bytes]:
    """Files of all formats, modes and orientations."""
    found = {
        "GIF": encoded(PLAIN.convert("P"), "GIF"),
        "BMP": encoded(PLAIN, "BMP"),
        "PPM": encoded(PLAIN, "PPM"),
        "animated GIF": encoded(
            PLAIN.convert("P"), "GIF", save_all=True, append_images=[PLAIN.rotate(90).convert("P")]
        ),
        "animated PNG": encoded(PLAIN, "PNG", save_all=True, append_images=[PLAIN.rotate(9)]),
        "PNG with damaged EXIF": encoded(PLAIN, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff"),
    }
    for mode in ("RGB", "RGBA", "P", "L", "1"):
        found[f"PNG {mode}"] = encoded(PLAIN.convert(mode), "PNG")
    for orientation in range(1, 9):
        exif = turned(orientation)
        for kind, options in (
            ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}),
            ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ):  # fmt: skip
            found[f"{kind} {options} {orientation}"] = encoded(PLAIN, kind, exif=exif, **options)
        late = exif.tobytes().removeprefix(b"Exif\0\0")
        found[f"PNG late {orientation}"] = chunk_behind_pixels(encoded(PLAIN, "PNG"), b"eXIf", late)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    found["PNG late XMP"] = chunk_behind_pixels(encoded(PLAIN, "PNG"), b"iTXt", xmp)
    return found


FILES = files()


@pytest.mark.parametrize("name", FILES)
def test_the_size_in_the_header_is_that_of_the_decoded_picture(name: str) -> None:
    """Fails if a prompt gets image tokens for another number of tiles than are cut."""
    assert upright_size(FILES[name], "it") == load_image(FILES[name]).size
    tiles = PictureTiles([FILES[name]], SHAPE)
    wanted = tile_image(load_image(FILES[name]), tile_size=32)
    assert len(tiles) == len(wanted)
    assert np.array_equal(np.asarray(tiles), np.stack([np.asarray(tile) for tile in wanted]))


def outcome(function: Callable[[], object]) -> str:
    try:
        function()
    except TruncatedImage as error:
        return f"truncated: {error}"
    except ValueError as error:
        return f"damaged: {error}"
    return "whole"


def damaged(data: bytes, variants: int) -> list[bytes]:
    """Cut and altered copies of a file."""
    rng = np.random.default_rng(len(data))
    found = [data[:-1], data[:-2], data[:-40], data[: len(data) // 2]]
    for _ in range(variants):
        copy = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            copy[place] = rng.integers(0, 256)
        found += [bytes(copy), data[: rng.integers(1, len(data))]]
    return found


def compare_verification(names: list[str], variants: int) -> set[str]:
    seen = set()
    for name in names:
        for data in [FILES[name], *damaged(FILES[name], variants)]:
            for choice in ("error", "accept"):
                title = f"image of {len(data)} bytes"
                pictures = Pictures.model_validate({"truncated": choice})
                truth = outcome(lambda: load_image(data, truncated=pictures.truncated))  # noqa: B023
                found = outcome(lambda: verify_image(data, title, truncated=pictures.truncated))  # noqa: B023
                assert found == truth, (name, choice)
                seen.add(truth.split(":")[0])
    return seen


SOME = ["JPEG {} 1", "JPEG {'progressive': True} 6", "PNG RGB", "WEBP {} 1", "GIF"]


def test_verification_finds_what_decoding_would() -> None:
    """Fails if a broken picture is found in the midst of a stage, or a whole one is refused."""
    assert compare_verification(SOME, 12) == {"whole", "truncated", "damaged"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_verification_finds_what_decoding_would_in_every_format() -> None:
    """Fails as the shorter form of this test does, for any format, mode or orientation."""
    assert compare_verification(list(FILES), 60) == {"whole", "truncated", "damaged"}


# The rows of a file.


def row(data: bytes, index: int = 0) -> Sample:
    return make_sample(
        question="How many?", ground_truth="3", data_source="t", index=index, images=[data]
    )


def test_a_damaged_row_is_named_before_a_bad_text_behind_it() -> None:
    """Fails if the first wrong row of a file is not the one that is told."""
    broken = bytearray(encoded(PLAIN, "PNG"))
    broken[60:90] = bytes(30)
    good = encoded(PLAIN, "JPEG")
    text = make_sample(
        question="What is <|im_end|>?", ground_truth="3", data_source="t", index=3, images=[good]
    )
    rows = [row(good), row(good, 1), text, row(good, 3)]
    with pytest.raises(ValueError, match=r"^d\.parquet row 2: .*special token"):
        encode_all(Path("d.parquet"), rows, tiny.tokenizer(), SHAPE)
    cut = [*rows]
    cut[1] = row(encoded(PLAIN, "JPEG")[:-200], 1)
    with pytest.raises(ValueError, match=r"^d\.parquet row 1: image of \d+ bytes is truncated"):
        encode_all(Path("d.parquet"), cut, tiny.tokenizer(), SHAPE)


def test_encoding_holds_no_tiles() -> None:
    """Fails if a data set is held as the tiles of its pictures again."""
    cache = TileCache()
    rows = [row(encoded(PLAIN, "JPEG"), i) for i in range(5)]
    found = encode_all(Path("d.parquet"), rows, tiny.tokenizer(), SHAPE, cache=cache)
    assert all(isinstance(one.tiles, PictureTiles) for one in found.values())
    assert cache.held_bytes == 0
    np.asarray(found[2].tiles)
    assert cache.held_bytes == len(found[2].tiles) * 32 * 32 * 3


# Tiles cut in the background.


class Watched(PictureTiles):
    """Tiles that note which thread cuts them, and wait until they may be cut."""

    def __init__(self, images: list[bytes], *, cache: TileCache | None = None) -> None:
        super().__init__(images, SHAPE, name="d.parquet row 7", cache=cache)
        self.cut_by: list[str] = []
        self.allowed = threading.Event()
        self.allowed.set()

    def cut(self) -> np.ndarray:
        self.allowed.wait(60)
        self.cut_by.append(threading.current_thread().name)
        return super().cut()


def some_tiles(cache: TileCache, count: int = 4) -> list[Watched]:
    return [
        Watched([encoded(PLAIN.rotate(i), "PNG")], cache=cache) for i in range(count)
    ]  # fmt: skip


def finish(cache: TileCache) -> None:
    """Wait until the background threads have nothing to do."""
    for worker in list(cache.workers):
        worker.join(60)


def test_tiles_are_cut_once_and_in_the_background() -> None:
    """Fails if training waits for pictures that were known before, or cuts them twice."""
    cache = TileCache(threads=1)
    tiles = some_tiles(cache)
    cache.ahead(tiles)
    cache.ahead(tiles)
    finish(cache)
    for one in (*tiles, *tiles):
        assert np.array_equal(np.asarray(one), PictureTiles.cut(one))
    assert [one.cut_by for one in tiles] == [["tiles"]] * 4


def test_no_more_is_cut_ahead_than_there_is_room_for() -> None:
    """Fails if the background fills the memory with a whole data set of tiles."""
    tiles = some_tiles(TileCache())
    size = tiles[0].cut_bytes
    cache = TileCache(4 * size, threads=1)
    for one in tiles:
        one.cache = cache
    cache.ahead(tiles)
    finish(cache)
    assert [len(one.cut_by) for one in tiles] == [1, 1, 0, 0]
    np.asarray(tiles[0])  # there is room again
    finish(cache)
    assert [len(one.cut_by) for one in tiles] == [1, 1, 1, 0]
    for one in tiles:
        np.asarray(one)
        finish(cache)
    assert [one.cut_by for one in tiles] == [["tiles"]] * 4
    assert cache.held_bytes <= 4 * size


def test_what_was_foreseen_in_vain_stops_nothing() -> None:
    """Fails if tiles that nobody asks for keep the background from cutting others."""
    cache = TileCache(4 * some_tiles(TileCache(), 1)[0].cut_bytes, threads=1)
    first, then = some_tiles(cache, 2), some_tiles(cache, 3)
    cache.ahead(first)
    finish(cache)
    np.asarray(then[0])
    cache.ahead(then)
    finish(cache)
    np.asarray(then[1])
    assert then[1].cut_by == ["tiles"]


def test_the_oldest_tiles_make_room() -> None:
    """Fails if more is kept than the budget, or small pictures are cut in every pass."""
    size = some_tiles(TileCache(), 1)[0].cut_bytes
    cache = TileCache(2 * size, threads=1)
    tiles = some_tiles(cache, 3)
    for i in (0, 1, 0, 2, 0, 1):
        np.asarray(tiles[i])
    assert [len(one.cut_by) for one in tiles] == [1, 2, 1]
    assert cache.held_bytes == 2 * size


def test_an_error_in_the_background_names_its_row_and_is_raised_where_it_is_needed() -> None:
    """Fails if a picture that went bad is lost with its thread, or ends another row."""
    images = [encoded(PLAIN, "JPEG")]
    cache = TileCache(threads=1)
    bad, good = Watched(images, cache=cache), some_tiles(cache, 1)[0]
    images[0] = images[0][:-300]
    cache.ahead([bad, good])
    finish(cache)
    np.asarray(good)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^d\.parquet row 7: image of \d+ bytes is truncated"):
            np.asarray(bad)


def test_an_interrupted_cut_can_be_done_again() -> None:
    """Fails if Ctrl-C while a picture is cut lets everyone wait for it for ever."""

    class Interrupted(Watched):
        def cut(self) -> np.ndarray:
            if not self.cut_by:
                self.cut_by.append("interrupted")
                raise KeyboardInterrupt
            return super().cut()

    cache = TileCache()
    tiles = Interrupted([encoded(PLAIN, "PNG")], cache=cache)
    with pytest.raises(KeyboardInterrupt):
        np.asarray(tiles)
    assert np.array_equal(np.asarray(tiles), PictureTiles.cut(tiles))


def test_closing_ends_the_threads_and_drops_what_waits() -> None:
    """Fails if an interrupted stage goes on to cut the pictures of its next step."""
    cache = TileCache(threads=1)
    tiles = some_tiles(cache)
    tiles[0].allowed.clear()
    cache.ahead(tiles)
    while cache.waiting > 3:
        time.sleep(0.001)
    closing = threading.Thread(target=cache.close)
    closing.start()
    while cache.waiting:
        time.sleep(0.001)
    tiles[0].allowed.set()
    closing.join(60)
    assert not closing.is_alive() and not cache.workers
    assert [len(one.cut_by) for one in tiles] == [1, 0, 0, 0]
    assert np.asarray(tiles[3]).shape == (len(tiles[3]), 32, 32, 3)  # it can still be used


def test_two_threads_that_ask_for_the_same_tiles_cut_them_once() -> None:
    """Fails if the background and the trainer do the same work at the same time."""
    cache = TileCache(threads=1)
    (one,) = some_tiles(cache, 1)
    one.allowed.clear()
    cache.ahead([one])
    found: list[np.ndarray] = []
    asking = threading.Thread(target=lambda: found.append(np.asarray(one)))
    asking.start()
    one.allowed.set()
    asking.join(60)
    assert len(found) == 1 and len(one.cut_by) == 1


def test_a_prompt_is_as_long_as_its_tiles_say() -> None:
    """Fails if the header and the tiles disagree about a picture that is turned."""
    data = encoded(Image.new("RGB", (200, 50)), "JPEG", exif=turned(6))
    example = encode_sample(row(data), tiny.tokenizer(), SHAPE)
    context = tiny.tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    assert example.prompt_ids.count(context) == 4 * len(np.asarray(example.tiles))
