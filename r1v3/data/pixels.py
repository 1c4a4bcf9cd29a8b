"""A decoded picture of any mode as 8-bit RGB: its tones kept, upright, on an opaque ground."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

Ground = Literal["white", "black"]

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height


def to_rgb(image: Image.Image, ground: Ground, *, depth: int = 8) -> Image.Image:
    """Convert a loaded picture to RGB as a viewer shows it.

    - Gray of 12 or 16 bits is scaled by its own range, to 0..255. 32-bit integers are scaled by
      the least of 8, 16, 24 and 32 bits that holds every value (files of 32 bits mostly carry 8 or
      16), signed ones by the positive half.
    - Gray floats have no range of their own: [0, 1] is scaled to 0..255 if it holds every value,
      else [0, 255], else [0, 65535]. NaN is black, infinities are the ends of the range.
    - Integers and floats with negative values, and floats above 65535, are stretched from the
      least to the greatest finite value.
    - TIFF's "white is zero" is inverted where the reader did not.
    - Transparency (an alpha channel or a transparent color) is laid on the ground.
    - The EXIF orientation is applied; one that is damaged or not 1 to 8 is ignored.

    Opaque, upright pictures of 8 bits have the pixels of `Image.convert("RGB")`.

    Args:
        image: loaded.
        ground: the color behind transparency.
        depth: bits per sample in the file, which a PNG's transparent color is given in.

    Raises:
        Exception: PIL's, of many types, where it cannot convert a mode.
    """
    orientation = orientation_of(image)
    if image.mode == "F" or image.mode.startswith("I"):
        converted = _deep_gray(image, ground)
    elif image.has_transparency_data:
        _scale_transparent_color(image, depth)
        converted = _on_ground(image.convert("RGBA"), ground)
    else:
        converted = image.convert("RGB")
    if orientation in _UPRIGHT:
        return converted.transpose(_UPRIGHT[orientation])
    return converted


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 (upright) where it has none that can be read."""
    return _orientation(image.getexif)


def orientation_in_header(image: Image.Image) -> int:
    """The same of what was read of a file so far; a PNG picture that is not loaded stays so."""
    return _orientation(lambda: Image.Image.getexif(image))


def _orientation(read: Callable[[], Image.Exif]) -> int:
    try:
        orientation = read().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data: many types
        return 1
    return orientation if isinstance(orientation, int) else 1


def _on_ground(picture: Image.Image, ground: Ground) -> Image.Image:
    backdrop = Image.new("RGBA", picture.size, ground)
    return Image.alpha_composite(backdrop, picture).convert("RGB")


def _scale_transparent_color(image: Image.Image, depth: int) -> None:
    """Give PNG's transparent color the scale of the decoded pixels, which have 8 bits."""
    color = image.info.get("transparency")
    if image.mode == "L" and isinstance(color, int) and depth < 8:
        image.info["transparency"] = color * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(color, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _deep_gray(image: Image.Image, ground: Ground) -> Image.Image:
    gray = Image.fromarray(_tones(image))
    color = image.info.get("transparency")
    if not isinstance(color, int):
        return gray.convert("RGB")
    opaque = np.where(np.asarray(image) == color, 0, 255).astype(np.uint8)
    gray.putalpha(Image.fromarray(opaque))
    return _on_ground(gray.convert("RGBA"), ground)


def _tones(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits as uint8 [H, W]; the rules stand at `to_rgb`."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    if image.mode == "F":
        tones = _scale_floats(values)
    elif image.mode.startswith("I;16"):
        top = 2**bits - 1
        table = ((np.arange(2**16) * 255 + top // 2) // top).clip(0, 255).astype(np.uint8)
        tones = table[values]
    elif image.format == "TIFF":
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
        tones = _scale_integers(values if signed else values.view(np.uint32), bits - signed)
    else:  # PNG and PPM of 16 bits
        tones = _scale(values, 0, 2**16 - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        tones = 255 - tones
    return tones


def _scale_integers(values: np.ndarray, bits: int) -> np.ndarray:
    least, greatest = int(values.min()), int(values.max())
    if least < 0:
        return _scale(values, least, greatest)
    held = next(n for n in (8, 16, 24, bits) if greatest < 2**n)
    return _scale(values, 0, 2 ** min(held, bits) - 1)


def _scale_floats(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    least, greatest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    top = next((top for top in (1.0, 255.0, 65535.0) if greatest <= top), None)
    if least < 0 or top is None:
        return _scale(values, least, greatest)
    return _scale(values, 0.0, top)


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """[low, high] to 0..255, rounded; values beyond are the ends, NaN and an empty range are 0."""
    scaled = values.astype(np.float64) - low
    if high > low:
        scaled *= 255 / (high - low)
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.floor(scaled.clip(0, 255, out=scaled) + 0.5).astype(np.uint8)
