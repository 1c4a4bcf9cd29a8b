"""Pictures as people have them: deep gray, transparency, orientation, metadata, truncation."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from r1v3.data.images import TruncatedImage, check_image_header, load_image, tile_image

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 23, height: int = 17, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def gray(image: Image.Image) -> np.ndarray:
    """The tones of a picture whose channels are equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


def ramp(top: float, kind: str) -> np.ndarray:
    """16 columns from 0 to top, in equal steps; 15 divides 255 and 65535."""
    return np.tile(np.linspace(0, top, 16).astype(kind), (3, 1))


STEPS = np.tile(np.arange(16) * 17, (3, 1))


# 8 bits, opaque, upright: the pixels that PIL's conversion gives.

RGB = Image.fromarray(noise())
ORDINARY: dict[str, bytes] = {
    "png": encoded(RGB),
    "jpeg": encoded(RGB, "JPEG", quality=90),
    "progressive jpeg": encoded(RGB, "JPEG", progressive=True),
    "gray jpeg": encoded(RGB.convert("L"), "JPEG"),
    "cmyk jpeg": encoded(RGB.convert("CMYK"), "JPEG"),
    "webp": encoded(RGB, "WEBP"),
    "lossless webp": encoded(RGB, "WEBP", lossless=True),
    "bmp": encoded(RGB, "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "packed tiff": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "cmyk tiff": encoded(RGB.convert("CMYK"), "TIFF"),
    "ppm": encoded(RGB, "PPM"),
    "gray png": encoded(RGB.convert("L")),
    "palette png": encoded(RGB.quantize(17)),
    "one bit png": encoded(RGB.convert("1")),
    "one bit tiff": encoded(RGB.convert("1"), "TIFF", compression="group4"),
    "gif": encoded(RGB, "GIF"),
    "opaque alpha": encoded(RGB.convert("RGBA")),
    "opaque gray alpha": encoded(RGB.convert("LA")),
}


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("ground", ["white", "black"])
def test_ordinary_pictures_have_the_bits_of_plain_conversion(kind: str, ground: Any) -> None:
    """Fails if a model would see other pixels of the pictures it was trained on."""
    plain = Image.open(io.BytesIO(ORDINARY[kind])).convert("RGB")
    found = load_image(ORDINARY[kind], ground=ground)
    assert found.tobytes() == plain.tobytes() and found.size == plain.size


# More than 8 bits.


def deep(values: np.ndarray, kind: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(values), kind, **options)


def tiff(values: np.ndarray, *, bits: int, sample_format: int, photometric: int = 1) -> bytes:
    """A TIFF of one strip, little-endian, of kinds that PIL reads and does not write."""
    height, width = values.shape
    fields = [
        (256, width), (257, height), (258, bits), (259, 1), (262, photometric),
        (273, 8 + 2 + 12 * 9 + 4), (277, 1), (279, values.nbytes), (339, sample_format),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    header = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0)
    return header + values.tobytes()


def pgm(top: int) -> bytes:
    return b"P5 16 3 %d\n" % top + ramp(top, ">u2").tobytes()


DEEP: dict[str, bytes] = {
    "16-bit png": deep(ramp(65535, "uint16"), "PNG"),
    "16-bit tiff": deep(ramp(65535, "uint16"), "TIFF"),
    "16-bit tiff, other byte order": encoded(
        Image.frombytes("I;16B", (16, 3), ramp(65535, ">u2").tobytes()), "TIFF"
    ),
    "16-bit tiff, packed": deep(ramp(65535, "uint16"), "TIFF", compression="tiff_deflate"),
    "16-bit tiff, white is zero": tiff(
        ramp(65535, "uint16")[:, ::-1].copy(), bits=16, sample_format=1, photometric=0
    ),
    "16-bit tiff, signed": tiff(ramp(32767, "int16"), bits=16, sample_format=2),
    "32-bit tiff of 8-bit values": deep(ramp(255, "int32"), "TIFF"),
    "32-bit tiff of 16-bit values": deep(ramp(65535, "int32"), "TIFF"),
    "32-bit tiff of 24-bit values": deep(ramp(2**24 - 1, "int32"), "TIFF"),
    "32-bit tiff, signed": deep(ramp(2**31 - 1, "int32"), "TIFF"),
    "32-bit tiff, unsigned": tiff(ramp(2**32 - 1, "uint32"), bits=32, sample_format=1),
    "32-bit tiff with negative values": deep(ramp(60000, "int32") - 30000, "TIFF"),
    "float tiff to 1": deep(ramp(1, "float32"), "TIFF"),
    "float tiff to 255": deep(ramp(255, "float32"), "TIFF"),
    "float tiff to 65535": deep(ramp(65535, "float32"), "TIFF"),
    "float tiff beyond": deep(ramp(1e30, "float32"), "TIFF"),
    "float tiff around 0": deep(ramp(2, "float32") - 1, "TIFF"),
    "float tiff, white is zero": tiff(
        ramp(1, "float32")[:, ::-1].copy(), bits=32, sample_format=3, photometric=0
    ),
    "10-bit pgm": pgm(1023 // 15 * 15),
    "16-bit pgm": pgm(65535),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_gray_keeps_its_tones(kind: str) -> None:
    """Fails if everything above 255 of 65535 is white, as clipping to 8 bits makes it."""
    assert np.abs(gray(load_image(DEEP[kind])) - STEPS).max() <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [-1e30, -70000, -1, -0.5, 65536, 1e6, 1e30, 3e38, float("nan")])
def test_one_tone_beyond_every_range_is_black(value: float) -> None:
    """Fails if a picture of one value is divided by its range of nothing."""
    image = load_image(deep(np.full((3, 4), value, "float32"), "TIFF"))
    assert image.getextrema() == ((0, 0),) * 3
    if -(2**31) < value < 0:
        assert load_image(deep(np.full((3, 4), value, "int32"), "TIFF")).size == (4, 3)


@pytest.mark.parametrize("level", [0, 1, 127, 128, 129, 257, 4095, 32767, 32768, 65407, 65535])
def test_16_bits_are_rounded_to_the_nearest_of_8(level: int) -> None:
    """Fails if tones are cut down (0..255 would lose the top one) or stretched by content."""
    found = gray(load_image(deep(np.full((2, 2), level, dtype=np.uint16), "PNG")))
    assert (found == round(level / 257)).all()


@pytest.mark.parametrize(
    ("values", "tones"),
    [
        ([np.nan, 1.0], [0, 255]), ([np.inf, 0.5], [255, 128]), ([-np.inf, 0.5], [0, 128]),
        ([np.nan, np.nan], [0, 0]), ([np.inf, 100.0], [255, 100]),
        ([np.nan, -4.0, 4.0], [0, 0, 255]),
    ],
)  # fmt: skip
def test_floats_that_are_no_numbers_do_not_spoil_the_others(
    values: list[float], tones: list[int]
) -> None:
    """Fails if one NaN or infinity makes the whole picture black, or an error."""
    found = gray(load_image(deep(np.array([values], dtype=np.float32), "TIFF")))
    assert found[0].tolist() == tones


# Transparency.


def transparent_png(*, depth: int, color: int, samples: bytes, key: bytes, width: int) -> bytes:
    """One row of samples and a tRNS chunk, of depths that PIL does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", key)]
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + samples)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def half_transparent(mode: str) -> Image.Image:
    """Two pixels: one red (or gray), one of alpha 0 over another color."""
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (9, 9, 9, 0))
    return image.convert(mode) if mode != "RGBA" else image


def indexed(kind: str) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 200, 200, 9, 9, 9])
    image.putpixel((1, 0), 1)
    return encoded(image, kind, transparency=1)


TRANSPARENT: dict[str, bytes] = {
    "rgba png": encoded(half_transparent("RGBA")),
    "gray alpha png": encoded(half_transparent("LA")),
    "palette png": indexed("PNG"),
    "palette png with alphas": encoded(half_transparent("RGBA").quantize(2)),
    "gif": indexed("GIF"),
    "webp": encoded(half_transparent("RGBA"), "WEBP", lossless=True, exact=True),
    "rgba tiff": encoded(half_transparent("RGBA"), "TIFF"),
    "rgb png with a color": encoded(half_transparent("RGB"), transparency=(9, 9, 9)),
    "gray png with a color": encoded(half_transparent("L"), transparency=9),
    "16-bit gray png with a color": transparent_png(
        depth=16, color=0, samples=struct.pack(">HH", 200 * 257, 9), key=struct.pack(">H", 9),
        width=2,
    ),
    "16-bit rgb png with a color": transparent_png(
        depth=16, color=2, samples=struct.pack(">6H", *[200 * 257] * 3, *[9 * 257] * 3),
        key=struct.pack(">3H", *[9 * 257] * 3), width=2,
    ),
    "16-bit gray alpha png": transparent_png(
        depth=16, color=4, samples=struct.pack(">4H", 200 * 257, 65535, 9, 0), key=b"", width=2
    ),
    "4-bit gray png with a color": transparent_png(
        depth=4, color=0, samples=bytes([0xC3]), key=struct.pack(">H", 3), width=2
    ),
    "2-bit gray png with a color": transparent_png(
        depth=2, color=0, samples=bytes([0b10_01_0000]), key=struct.pack(">H", 1), width=2
    ),
    "one bit png with a color": transparent_png(
        depth=1, color=0, samples=bytes([0b10_000000]), key=struct.pack(">H", 0), width=2
    ),
}  # fmt: skip
OPAQUE_TONE = {"4-bit gray png with a color": 204, "2-bit gray png with a color": 170,
               "one bit png with a color": 255}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_laid_on_the_ground(kind: str) -> None:
    """Fails if a diagram shows what lies below its transparent pixels, often black on black."""
    tone = OPAQUE_TONE.get(kind, 200)
    for ground, color in (("white", WHITE), ("black", BLACK)):
        image = load_image(TRANSPARENT[kind], ground=ground)  # type: ignore[arg-type]
        assert image.getpixel((0, 0)) == (tone,) * 3
        assert image.getpixel((1, 0)) == color
    assert load_image(TRANSPARENT[kind]).getpixel((1, 0)) == WHITE


@pytest.mark.parametrize("alpha", [1, 64, 127, 128, 200, 254])
def test_half_transparent_pixels_are_mixed_with_the_ground(alpha: int) -> None:
    """Fails if alpha counts as all or nothing: anti-aliased strokes would turn ragged."""
    image = Image.new("RGBA", (1, 1), (40, 80, 120, alpha))
    for ground, level in (("white", 255), ("black", 0)):
        found = load_image(encoded(image), ground=ground).getpixel((0, 0))  # type: ignore[arg-type]
        for channel, value in zip(found, (40, 80, 120), strict=True):  # type: ignore[arg-type]
            assert abs(channel - (value * alpha + level * (255 - alpha)) / 255) <= 1


# Orientation.


def oriented(kind: str, orientation: Any) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"exif": exif.tobytes()}
    if kind == "WEBP":
        options["lossless"] = True  # type: ignore[assignment]
    return encoded(RGB, kind, **options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    """Fails if a phone's photograph lies on its side."""
    pixels = np.asarray(Image.open(io.BytesIO(encoded(RGB, kind, **(
        {"lossless": True} if kind == "WEBP" else {}))))
    )  # fmt: skip
    turned = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2), 8: np.rot90(pixels),
    }  # fmt: skip
    found = load_image(oriented(kind, orientation))
    assert np.array_equal(np.asarray(found), turned[orientation])


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40, b"nonsense",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Truncated:UserWarning")
def test_damaged_exif_data_is_no_reason_to_refuse(exif: bytes) -> None:
    """Fails if a picture that every viewer shows is an error, or turned at random."""
    data = encoded(RGB, "JPEG", exif=exif)
    assert load_image(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    """Fails if it is an error, or turned at random."""
    data = oriented("PNG", orientation)
    assert load_image(data).tobytes() == RGB.tobytes()


# Metadata and several pictures in one file.


def with_texts(*texts: tuple[str, str], after: bool = False, compressed: bool = True) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts:
        info.add_itxt(key, text, zip=compressed)
    data = encoded(RGB, pnginfo=info)
    if after:  # move the texts behind the pixels, where they may stand too
        plain = encoded(RGB)
        extra = data[len(plain[:33]) : len(data) - len(plain) + 33]
        data = plain[:-12] + extra + plain[-12:]
    return data


@pytest.mark.parametrize("megabytes", [1.1, 5])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("key", ["Comment", "XML:com.adobe.xmp"])
def test_large_texts_are_no_reason_to_refuse(megabytes: float, after: bool, key: str) -> None:
    """Fails if a picture is refused for the editing history that a program wrote into it."""
    data = with_texts((key, "edited " * int(megabytes * 1e6 / 7)), after=after)
    check_image_header(data, "image")
    assert load_image(data).tobytes() == RGB.tobytes()


def test_a_large_color_profile_is_no_reason_to_refuse() -> None:
    """Fails if a picture is refused for a profile that is not used."""
    data = encoded(RGB, icc_profile=bytes(2_000_000))
    assert load_image(data).tobytes() == RGB.tobytes()


@pytest.mark.parametrize("after", [False, True])
def test_texts_that_inflate_without_end_are_refused(after: bool) -> None:
    """Fails if 100 kB of a file can take 100 MB of memory."""
    data = with_texts(("Comment", "a" * (65 << 20)), after=after)
    assert len(data) < 200_000
    with pytest.raises(ValueError, match="bytes"):
        load_image(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_picture_of_several_is_shown(kind: str) -> None:
    """Fails if an animation is an error, or shows a later frame."""
    frames = [Image.new("RGB", (6, 5), (10 * n, 20, 30)) for n in (1, 9, 15)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert load_image(data).tobytes() == frames[0].tobytes()


# Truncation.

WHOLE: dict[str, bytes] = {
    "png": ORDINARY["png"],
    "alpha png": ORDINARY["opaque alpha"],
    "16-bit png": encoded(Image.fromarray(noise(channels=1).astype(np.uint16) * 200)),
    "jpeg": ORDINARY["jpeg"],
    "progressive jpeg": ORDINARY["progressive jpeg"],
    "gif": ORDINARY["gif"],
    "bmp": ORDINARY["bmp"],
    "tiff": ORDINARY["tiff"],
    "ppm": ORDINARY["ppm"],
    "gray jpeg": ORDINARY["gray jpeg"],
    "webp": ORDINARY["webp"],
    "lossless webp": ORDINARY["lossless webp"],
    "packed tiff": ORDINARY["packed tiff"],
}
NEEDS_ITS_END = ("webp", "lossless webp", "packed tiff")


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("missing", [13, 25, 60])
def test_a_truncated_picture_is_a_choice(kind: str, missing: int) -> None:
    """Fails if one truncated file of a million can only end the run, or trains unnoticed."""
    data = WHOLE[kind][:-missing]
    if kind in ("png", "alpha png", "16-bit png") and missing == 13:
        return  # only the end chunk is missing
    check_image_header(data, "image")
    for choice in ("error", "skip"):
        with pytest.raises(TruncatedImage, match=r"image of \d+ bytes is truncated"):
            load_image(data, truncated=choice)  # type: ignore[arg-type]
    if kind in NEEDS_ITS_END:
        with pytest.raises(TruncatedImage):
            load_image(data, truncated="accept")
        return
    whole, padded = load_image(WHOLE[kind]), load_image(data, truncated="accept")
    assert padded.size == whole.size
    assert padded.crop((0, 0, 23, 1)).tobytes() == whole.crop((0, 0, 23, 1)).tobytes() or (
        kind in ("bmp", "progressive jpeg")  # from the bottom up; coarse to fine
    )
    with pytest.raises(TruncatedImage):  # accepting one changes nothing for the next
        load_image(data)


@pytest.mark.filterwarnings("ignore:(Truncated File Read|Corrupt EXIF data):UserWarning")
@pytest.mark.parametrize("missing", [1, 2, 5, 8, 11, 14])
@pytest.mark.parametrize("packing", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_a_tiff_that_ends_within_the_values_of_its_directory_is_truncated(
    packing: str, missing: int
) -> None:
    """Fails if the last bytes of a TIFF file decide whether it is truncated or no picture."""
    whole = encoded(RGB, "TIFF", compression=packing)
    load_image(whole)
    check_image_header(whole[:-missing], "image")
    with pytest.raises(TruncatedImage):
        load_image(whole[:-missing])


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif"])
@pytest.mark.parametrize("choice", ["error", "accept", "skip"])
def test_corrupt_pixels_are_an_error_whatever_becomes_of_truncated_ones(
    kind: str, choice: Any
) -> None:
    """Fails if `accept` lets through what a file says wrongly in its middle."""
    data = bytearray(WHOLE[kind])
    middle = len(data) * 2 // 3
    data[middle : middle + 60] = b"\xff" * 60
    with pytest.raises(ValueError) as caught:
        load_image(bytes(data), truncated=choice)
    assert not isinstance(caught.value, TruncatedImage)


def test_the_minimum_of_tiles_is_kept() -> None:
    """Fails if a model that wants at least four tiles is shown one."""
    assert len(tile_image(Image.new("RGB", (8, 8)), tile_size=8, min_tiles=4)) == 5
