"""InternVL's dynamic tiling: grid choice, crops, normalization, and files that are not images."""

import io
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from r1v3.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_image_header,
    choose_grid,
    load_image,
    pixel_values,
    tile_image,
)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("width", "height", "grid", "tiles"),
    [
        (640, 480, (4, 3), 13), (800, 600, (4, 3), 13), (1024, 768, (4, 3), 13),
        (1920, 1080, (4, 2), 9), (900, 900, (2, 2), 5), (448, 448, (1, 1), 1), (28, 28, (1, 1), 1),
        (100, 5000, (1, 12), 13), (5000, 100, (12, 1), 13), (1, 1, (1, 1), 1),
    ],
)  # fmt: skip
def test_known_sizes(width: int, height: int, grid: tuple[int, int], tiles: int) -> None:
    """Other counts than the released preprocessing's would misplace every image token."""
    assert choose_grid(width, height, tile_size=448) == grid
    assert len(tile_image(Image.new("RGB", (width, height)), tile_size=448)) == tiles


def brute_force(width: int, height: int, size: int, low: int, high: int) -> set[tuple[int, int]]:
    """Grids that the rule allows, in any order within one area.

    Distances are float64, as in the released preprocessing: where two are equal in rational
    arithmetic (7 x 12 is as far from 1 x 2 as from 2 x 3), rounding decides there too.
    """
    ratio = width / height
    grids = [(i, j) for i in range(1, high + 1) for j in range(1, high + 1) if low <= i * j <= high]
    nearest = min(abs(ratio - i / j) for i, j in grids)
    winners = [(i, j) for i, j in grids if abs(ratio - i / j) == nearest]
    first_area = min(i * j for i, j in winners)
    chosen = {(i, j) for i, j in winners if i * j == first_area}
    for area in sorted({i * j for i, j in winners} - {first_area}):
        if 2 * width * height > size * size * area:
            chosen = {(i, j) for i, j in winners if i * j == area}
    return chosen


@given(
    width=st.integers(1, 6000), height=st.integers(1, 6000),
    size=st.sampled_from([16, 28, 336, 448]), high=st.integers(1, 24), low=st.integers(1, 4),
)  # fmt: skip
@example(width=7, height=12, size=16, high=6, low=1)
@settings(max_examples=400, deadline=None)
def test_grid_agrees_with_brute_force(
    width: int, height: int, size: int, high: int, low: int
) -> None:
    """The chosen grid must be the nearest one, for every size and tile budget."""
    low = min(low, high)
    grid = choose_grid(width, height, tile_size=size, min_tiles=low, max_tiles=high)
    assert grid in brute_force(width, height, size, low, high)


@given(
    scale=st.integers(1, 400), columns=st.integers(1, 6), rows=st.integers(1, 6),
    size=st.sampled_from([28, 448]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_ties_are_decided_by_pixels(scale: int, columns: int, rows: int, size: int) -> None:
    """Random sizes rarely have the exact shape of several grids; these always do."""
    width, height = columns * scale, rows * scale
    grid = choose_grid(width, height, tile_size=size, max_tiles=12)
    assert {grid} == brute_force(width, height, size, 1, 12)


@pytest.mark.parametrize("high", [6, 12, 18, 24, 40])
def test_order_within_one_area_never_matters(high: int) -> None:
    """Where two grids of equal area tie, a third must be nearer, or the rule would be ambiguous."""
    grids = [(i, j) for i in range(1, high + 1) for j in range(1, high + 1) if i * j <= high]
    ratios = {grid: Fraction(*grid) for grid in grids}
    for a in grids:
        for b in grids:
            if a < b and a[0] * a[1] == b[0] * b[1]:
                middle = (ratios[a] + ratios[b]) / 2
                nearest = min(abs(middle - ratio) for ratio in ratios.values())
                assert nearest < abs(middle - ratios[a])


def test_tie_rule_at_its_exact_boundary() -> None:
    """2x2 replaces 1x1 only above half of its pixels: 633 px is above, 2 * 448^2 itself is not."""
    assert choose_grid(633, 633, tile_size=448, max_tiles=4) == (1, 1)
    assert choose_grid(634, 634, tile_size=448, max_tiles=4) == (2, 2)
    assert choose_grid(20, 20, tile_size=10, max_tiles=8) == (2, 2)
    assert choose_grid(4, 8, tile_size=4, max_tiles=8) == (1, 2)  # 32 pixels, half of 2x4 is 64


def test_tiles_are_row_major_crops_of_the_resized_image_and_a_thumbnail() -> None:
    """A transposed order would shuffle the picture under the position embeddings."""
    image = noise(60, 40)
    tiles = tile_image(image, tile_size=20, max_tiles=6)
    assert len(tiles) == 7
    for row in range(2):
        for column in range(3):
            box = (20 * column, 20 * row, 20 * column + 20, 20 * row + 20)
            assert tiles[3 * row + column].tobytes() == image.crop(box).tobytes()
    thumbnail = image.resize((20, 20), Image.Resampling.BICUBIC)
    assert tiles[6].tobytes() == thumbnail.tobytes()
    assert len(tile_image(image, tile_size=20, max_tiles=6, thumbnail=False)) == 6
    assert len(tile_image(image, tile_size=20, max_tiles=1)) == 1


def test_resize_is_bicubic() -> None:
    """Another filter would shift every pixel value away from the released preprocessing."""
    image = noise(37, 23)
    (tile,) = tile_image(image, tile_size=16, max_tiles=1)
    assert tile.tobytes() == image.resize((16, 16), Image.Resampling.BICUBIC).tobytes()
    assert tile.tobytes() != image.resize((16, 16), Image.Resampling.BILINEAR).tobytes()


def test_pixel_values_are_normalized_per_channel() -> None:
    """Channels swapped, or CLIP's statistics, would pass every shape check."""
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    values = pixel_values([image, image])
    assert values.shape == (2, 3, 4, 4) and values.dtype == torch.float32
    assert values.is_contiguous()
    for channel, level in enumerate((1.0, 0.0, 0.2)):
        expected = (level - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(values[:, channel], torch.full((2, 4, 4), expected))


def test_pixel_values_keep_rows_and_columns() -> None:
    """Height and width must not be exchanged on the way to the tensor."""
    image = Image.new("RGB", (3, 3))
    image.putpixel((2, 0), (255, 255, 255))
    values = pixel_values([image], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert values[0, 0].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("tiles", "match"),
    [
        ([], "empty"),
        ([Image.new("L", (4, 4))], r"tiles\[0\] is L"),
        ([Image.new("RGB", (4, 5))], "4x5"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 5))], r"tiles\[1\]"),
    ],
)
def test_pixel_values_refuses_other_tiles(tiles: list[Image.Image], match: str) -> None:
    """A gray or odd-sized tile should be named here, not fail inside the model."""
    with pytest.raises(ValueError, match=match):
        pixel_values(tiles)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"width": 0}, "width 0"), ({"height": -1}, "height -1"), ({"tile_size": 0}, "tile_size 0"),
        ({"min_tiles": 0}, "min_tiles 0"), ({"min_tiles": 13}, "min_tiles 13"),
        ({"max_tiles": 0}, "max_tiles 0"),
    ],
)  # fmt: skip
def test_grid_arguments_are_checked(arguments: dict[str, int], name: str) -> None:
    """Otherwise a zero would become a division error or an empty list of tiles."""
    with pytest.raises(ValueError, match=name):
        choose_grid(**{"width": 10, "height": 10, "tile_size": 4, **arguments})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_load_image_reads_common_formats(tmp_path: Path, kind: str) -> None:
    """From a path, a string and bytes alike."""
    data = encoded(noise(9, 5), kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    for source in (path, str(path), data):
        image = load_image(source)
        assert image.mode == "RGB" and image.size == (9, 5)
        check_image_header(data, "image")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_load_image_converts_every_mode_to_rgb(mode: str) -> None:
    """Gray scans and transparent diagrams are common in exam questions."""
    image = Image.new(mode, (6, 4))
    assert load_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG")).mode == "RGB"


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\x00"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


WHOLE = encoded(noise(64, 64))
UNREADABLE = {
    "text": b"this is no image",
    "empty": b"",
    "signature only": WHOLE[:8],
    "half a header": WHOLE[:20],
    "zero width": png_of_size(0, 10),
    "bomb": png_of_size(60_000, 60_000),
    "large": png_of_size(10_000, 10_000),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_images_are_named(tmp_path: Path, kind: str) -> None:
    """PIL raises a dozen types, some without a word; the file's name must be in the message."""
    path = tmp_path / "scan.png"
    path.write_bytes(UNREADABLE[kind])
    with pytest.raises(ValueError, match=r"scan\.png"):
        load_image(path)
    with pytest.raises(ValueError, match="bytes"):
        load_image(UNREADABLE[kind])
    with pytest.raises(ValueError, match=r"^item 3 "):
        check_image_header(UNREADABLE[kind], "item 3")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_truncated_images_are_refused(tmp_path: Path, kind: str) -> None:
    """Half a picture would otherwise train as a picture with a gray lower half."""
    path = tmp_path / "half"
    data = encoded(noise(64, 64), kind)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="half"):
        load_image(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    """An OSError without context would not say which of a million images is gone."""
    with pytest.raises(ValueError, match=r"gone\.png.*cannot be read"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(tmp_path)


@given(st.binary(max_size=200), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_an_image_or_a_value_error(noise_bytes: bytes, position: int) -> None:
    """Damaged headers make PIL's readers raise nearly anything."""
    for data in (noise_bytes, WHOLE[:position] + noise_bytes + WHOLE[position + 200 :]):
        try:
            assert load_image(data).mode == "RGB"
        except ValueError:
            pass


def test_reading_and_tiling_load_no_torch() -> None:
    """Building and checking data files should not wait for torch."""
    program = "import sys, r1v3.data.schema, r1v3.data.images; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
