"""Images as InternVL sees them: decoding, dynamic tiling and normalization, with PIL only.

Follows the released preprocessing (InternVL `dynamic_preprocess`, used unchanged by Skywork-R1V):
a grid of square tiles close to the image's shape, bicubic resize, row-major crops, and a thumbnail.
At 448 pixels and up to 12 tiles, 640x480 becomes 4x3 + 1 = 13 tiles and 448x448 stays 1.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from r1v3.data.pixels import TURNED, Ground, orientation_in_header, to_rgb

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 89_478_485  # PIL's own limit, above which it warns of a decompression bomb
MAX_FILE_BYTES = 64 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Truncated = Literal["error", "accept", "skip"]

# PIL reads a PNG's texts and color profile with the picture, and refuses 1 MiB of them. They may
# be as large as a file; what inflates beyond that is a decompression bomb.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_FILE_BYTES
# What PIL's decoders say where a file ends before its last pixel.
_ENDS_EARLY = ("truncated", "not enough image data", "cannot load this image")
_TRUNCATION = threading.Lock()
# By the number of a type in a TIFF directory; the others have 1 byte.
_TIFF_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


class TruncatedImage(ValueError):
    """A picture whose file ends before its last pixel."""


def open_image(data: bytes, name: str) -> Image.Image:
    """Open an image and check its header; the pixels are not decoded yet.

    Raises:
        TruncatedImage: the file ends before its reader can open it.
        ValueError: it is no image of an accepted format and size; the message starts with `name`.
    """
    if not data:
        raise ValueError(f"{name} is empty, not an image")
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes; an image may have {MAX_FILE_BYTES}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if _is_cut_before_header(data):
            raise _truncated(name) from error
        raise ValueError(f"{name} is not an image in one of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large to decode: {error}") from error
    except Exception as error:  # PIL's readers raise struct.error, SyntaxError, ... on bad headers
        if _is_cut_before_header(data):
            raise _truncated(name) from error
        raise ValueError(f"{name} is not a readable image: {error}") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is {width}x{height} pixels; it must be at least 1x1")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} is {width}x{height} pixels; at most {MAX_PIXELS} are decoded")
    return image


def _truncated(name: str) -> TruncatedImage:
    return TruncatedImage(
        f"{name} is truncated: the file ends before its last pixel "
        "(`pictures.truncated`: accept pads it, skip leaves its row out)"
    )


def _is_cut_before_header(data: bytes) -> bool:
    """Whether a file ends early whose reader needs more than the first bytes to open it.

    A WebP file states its length; a TIFF file says where its directory and longer values of it
    are, often at the end.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return 30 <= len(data) < int.from_bytes(data[4:8], "little") + 8
    orders: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
    if len(data) < 8 or data[:4] not in orders:
        return False
    return len(data) < _tiff_directory_end(data, orders[data[:4]])


def _tiff_directory_end(data: bytes, order: Literal["little", "big"]) -> int:
    """Where the first directory of a TIFF file and the values that it points to end."""

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)

    first = number(4, 4) + 2
    end = first + 12 * number(first - 2, 2)
    for entry in range(first, min(end, len(data) - 11), 12):
        size = _TIFF_TYPE_BYTES.get(number(entry + 2, 2), 1) * number(entry + 4, 4)
        if size > 4:
            end = max(end, number(entry + 8, 4) + size)
    return end


def _png_chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Start and kind of the chunks of a PNG file, as far as it goes."""
    position = len(b"\x89PNG\r\n\x1a\n")
    while position + 8 <= len(data):
        yield position, data[position + 4 : position + 8]
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _is_cut_png(data: bytes) -> bool:
    """Whether a PNG file ends before its end chunk."""
    return not any(kind == b"IEND" and start + 12 <= len(data) for start, kind in _png_chunks(data))


def _has_late_metadata(data: bytes) -> bool:
    """Whether a PNG file has texts or EXIF data behind its pixels, which opening does not read."""
    after = False
    for _, kind in _png_chunks(data):
        if after and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        after = after or kind == b"IDAT"
    return False


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height of the picture that `load_image` makes of a file.

    They are in the header, except of a PNG file that has metadata behind its pixels: only decoding
    reads these, and they may turn the picture.

    Raises:
        TruncatedImage: the file ends before its reader can open it.
        ValueError: as `open_image`; the message starts with `name`.
    """
    with open_image(data, name) as image:
        width, height = image.size
        if image.format == "PNG" and _has_late_metadata(data):
            with suppress(Exception):  # what cannot be decoded is told where it is decoded
                image.load()
        # TIFF files are turned where they are decoded.
        turned = image.format != "TIFF" and orientation_in_header(image) in TURNED
    return (height, width) if turned else (width, height)


def verify_image(data: bytes, name: str, *, truncated: Truncated = "error") -> None:
    """Raise what `load_image` would raise for the same file; costs less for a JPEG.

    A whole JPEG is decoded to an eighth of its size: all of its data is read, which is where damage
    shows, and few pixels are made. Of all other formats nothing less than decoding reads all data.

    Raises:
        TruncatedImage, ValueError: as `load_image`; the message starts with `name`.
    """
    _load(data, name, "white", truncated, full=False)


def check_image_header(data: bytes, name: str) -> None:
    """Cheap check that `data` starts like an image of an accepted format and size.

    A file that is whole up to where it ends passes: `load_image` decides about truncated ones.

    Args:
        data: the encoded image.
        name: what to call it in the error.

    Raises:
        ValueError: it does not; the message starts with `name`.
    """
    try:
        with open_image(data, name) as image:
            image.verify()
    except TruncatedImage:
        return
    except ValueError:
        raise
    except Exception as error:
        if not _is_cut_png(data):
            raise ValueError(f"{name} is damaged: {error}") from error


def load_image(
    source: str | Path | bytes, *, ground: Ground = "white", truncated: Truncated = "error"
) -> Image.Image:
    """Decode a picture to 8-bit RGB, upright and opaque; see `pixels.to_rgb`.

    Of an animation or of several pages it is the first.

    Args:
        source: a path, or the bytes of an image file (PNG, JPEG, WebP, GIF, BMP, TIFF or PPM).
        ground: the color behind transparency.
        truncated: what becomes of a file that ends before its last pixel. accept: the pixels that
            are missing are as the decoder leaves them (black; gray in a JPEG; the ground where the
            picture has transparency). WebP cannot be decoded then.

    Raises:
        TruncatedImage: the file ends before its last pixel, and that is not accepted.
        ValueError: the file is missing, unreadable, damaged, in another format, empty, above 64
            MiB or above 89 million pixels, or its texts inflate to more than 64 MiB. The message
            names the file.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    return _load(data, name, ground, truncated)


def _load(
    data: bytes, name: str, ground: Ground, truncated: Truncated, *, full: bool = True
) -> Image.Image:
    try:
        return _decode(data, name, ground, full=full)
    except TruncatedImage:
        if truncated != "accept":
            raise
    with _incomplete_files_decoded():
        return _decode(data, name, ground, full=full)


def _read(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{name} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def _decode(data: bytes, name: str, ground: Ground, *, full: bool) -> Image.Image:
    """Decode to RGB; `full`: in full size, where the format can also give less."""
    with open_image(data, name) as image:
        depth = data[24] if image.format == "PNG" else 8  # in the PNG's header
        try:
            if not full:
                image.draft(None, (1, 1))
            image.load()
            return to_rgb(image, ground, depth=depth)
        except Exception as error:  # truncated or corrupt pixel data; many types, as above
            cut = any(words in str(error) for words in _ENDS_EARLY)
            if cut or _is_cut_before_header(data):
                raise _truncated(name) from error
            raise ValueError(f"{name} cannot be decoded: {error}") from error


@contextmanager
def _incomplete_files_decoded() -> Iterator[None]:
    """PIL decodes what there is of a file; its switch is one of the whole process."""
    with _TRUNCATION:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles.

    Ordered by area, then by columns. From min_tiles = 1 the order within one area decides nothing:
    where two grids of equal area are equally close to an image's shape, a third is closer.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def choose_grid(
    width: int, height: int, *, tile_size: int, min_tiles: int = 1, max_tiles: int = 12
) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is closest to width / height.

    On equal distance a later, larger grid replaces an earlier one only if the image has more than
    half of the larger grid's pixels.

    Raises:
        ValueError: a size is below 1, or min_tiles is not in [1, max_tiles].
    """
    for name, value in {"width": width, "height": height, "tile_size": tile_size}.items():
        if value < 1:
            raise ValueError(f"{name} {value!r} must be at least 1 pixel")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles {min_tiles!r} must be from 1 to max_tiles {max_tiles!r}")
    ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(ratio - columns / rows)
        enough_pixels = width * height > 0.5 * tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and enough_pixels):
            best, best_distance = (columns, rows), distance
    return best


def tile_image(
    image: Image.Image,
    *,
    tile_size: int,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
) -> list[Image.Image]:
    """Square tiles of `image` in row-major order, then a thumbnail of the whole image.

    The thumbnail is left out when the grid is a single tile, which already shows everything.

    Args:
        image: of any size; it is resized to the grid, without regard to its aspect ratio.
        tile_size: side of a tile in pixels (448 for InternVL3).
        min_tiles, max_tiles: bounds on the number of tiles without the thumbnail.
        thumbnail: add the thumbnail.

    Raises:
        ValueError: as `choose_grid`.
    """
    columns, rows = choose_grid(
        image.width, image.height, tile_size=tile_size, min_tiles=min_tiles, max_tiles=max_tiles
    )
    size = (columns * tile_size, rows * tile_size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((left, top, left + tile_size, top + tile_size))
        for top in range(0, size[1], tile_size)
        for left in range(0, size[0], tile_size)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles


def normalize(
    tiles: np.ndarray,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """uint8 [n, S, S, 3] to float32 [n, 3, S, S]: (pixel / 255 - mean) / std per RGB channel."""
    import torch

    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).to(torch.float32) / 255
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return ((pixels - shift) / scale).contiguous()


def pixel_values(
    tiles: Sequence[Image.Image],
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """`normalize`d tiles, float32 [tiles, 3, S, S].

    Raises:
        ValueError: there are no tiles, or they are not RGB squares of one size.
    """
    if not tiles:
        raise ValueError("tiles is empty; at least one tile is needed")
    side = tiles[0].width
    for index, tile in enumerate(tiles):
        if tile.mode != "RGB" or tile.size != (side, side):
            raise ValueError(
                f"tiles[{index}] is {tile.mode} {tile.width}x{tile.height}; "
                f"it must be RGB {side}x{side}"
            )
    return normalize(np.stack([np.asarray(tile) for tile in tiles]), mean=mean, std=std)
