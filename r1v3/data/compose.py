"""Composes handwritten scans into pictures: a 4 x 4 grid of cells on a slate."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from r1v3.data.digits import scans

GRID = 4
CELL = 16
IMAGE_SIZE = GRID * CELL
# A slate near the ImageNet mean: after normalization the background is close to zero, so the
# patch embedding sees ink and not a constant offset.
_SLATE = np.array([118, 112, 102])
_STROKES = {"+": ((3, 8, 13, 8), (8, 3, 8, 13)), "-": ((3, 8, 13, 8),)}


@dataclass(frozen=True)
class Cell:
    """One grid cell: the row and column it is in, and a scan id or an operator sign."""

    row: int
    column: int
    content: int | str


def _digit_ink(scan: int, rng: np.random.Generator) -> np.ndarray:
    """Ink coverage [CELL, CELL] in [0, 1] of one scan, slightly rotated, scaled and shifted."""
    source = Image.fromarray(scans().pixels[scan])
    size = int(rng.integers(13, 17))
    ink = source.resize((size, size), Image.Resampling.BICUBIC)
    ink = ink.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    sheet = Image.new("L", (CELL, CELL))
    slack = CELL - size
    sheet.paste(ink, (int(rng.integers(0, slack + 1)), int(rng.integers(0, slack + 1))))
    return np.asarray(sheet, dtype=np.float32) / 255


def _sign_ink(sign: str, rng: np.random.Generator) -> np.ndarray:
    ink = np.zeros((CELL, CELL), dtype=np.float32)
    dx, dy = (int(v) for v in rng.integers(-1, 2, 2))
    for x0, y0, x1, y1 in _STROKES[sign]:
        ink[y0 - 1 + dy : y1 + 1 + dy, x0 - 1 + dx : x1 + 1 + dx] = 1.0
    return ink


def compose(cells: list[Cell], rng: np.random.Generator) -> np.ndarray:
    """Draw the cells in chalk on a slate: uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    ink = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for cell in cells:
        if not (0 <= cell.row < GRID and 0 <= cell.column < GRID):
            raise ValueError(f"cell ({cell.row}, {cell.column}) is outside {GRID} x {GRID}")
        drawn = (
            _sign_ink(cell.content, rng)
            if isinstance(cell.content, str)
            else _digit_ink(cell.content, rng)
        )
        y, x = cell.row * CELL, cell.column * CELL
        ink[y : y + CELL, x : x + CELL] = drawn
    slate = _SLATE + rng.integers(-8, 9)
    chalk = rng.integers(225, 256, 3)
    shade = slate + (chalk - slate) * np.clip(ink * rng.uniform(0.95, 1.15), 0, 1)[..., None]
    return np.round(np.clip(shade, 0, 255)).astype(np.uint8)


def to_png(picture: np.ndarray) -> bytes:
    """PNG bytes of a uint8 [H, W, 3] picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
