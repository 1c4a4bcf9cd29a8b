"""Tiles of pictures: counted from the pictures' headers, cut when they are needed.

A picture of 640 x 480 pixels is a file of some 70 kB, and 13 tiles of 602 kB each. So files are
held, not tiles: `PictureTiles` knows how many there are, and numpy makes an array of it. A
`TileCache` cuts tiles in the background before they are asked for, and keeps the latest ones.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from r1v3.config import DEFAULT_PICTURES, Pictures
from r1v3.cores import cores_of_rank
from r1v3.data.images import choose_grid, load_image, tile_image, upright_size, verify_image

KEPT_BYTES = 512 << 20


@dataclass(frozen=True)
class ImageShape:
    """From a picture's file to tiles.

    Attributes:
        tile_size: in pixels.
        max_tiles, min_tiles: bounds on a picture's tiles beside its thumbnail.
        tokens_per_tile: image tokens in the prompt.
        thumbnail: whether a picture of several tiles also gets one of the whole.
        pictures: how files are decoded.
    """

    tile_size: int
    max_tiles: int
    tokens_per_tile: int
    min_tiles: int = 1
    thumbnail: bool = True
    pictures: Pictures = DEFAULT_PICTURES

    def count(self, width: int, height: int) -> int:
        """Return the number of tiles of a picture of this size, its thumbnail included."""
        columns, rows = choose_grid(
            width,
            height,
            tile_size=self.tile_size,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
        )
        return columns * rows + (self.thumbnail and columns * rows > 1)

    def cut(self, data: bytes) -> list[np.ndarray]:
        """Return the tiles of a picture, uint8 [S, S, 3] each; raises as `load_image`."""
        tiles = tile_image(
            decode_picture(data, self.pictures),
            tile_size=self.tile_size,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            thumbnail=self.thumbnail,
        )
        return [np.asarray(tile) for tile in tiles]


def decode_picture(data: bytes, pictures: Pictures) -> Image.Image:
    """The pixels of a picture that every engine gets; raises as `load_image`."""
    return load_image(data, ground=pictures.ground, truncated=pictures.truncated)


class PictureTiles:
    """The tiles of a sample's pictures, one picture after the other: uint8 [n, S, S, 3].

    `len` is n. `numpy.asarray` cuts them: anew every time, or once for a cache that keeps them.

    Args:
        images: the pictures' files.
        name: of the sample, to stand in front of errors; "" for none.
        cache: where the tiles are kept.

    Attributes:
        counts: tiles of each picture.

    Raises:
        TruncatedImage, ValueError: a header cannot be read; as `upright_size`.
    """

    def __init__(
        self,
        images: Sequence[bytes],
        shape: ImageShape,
        *,
        name: str = "",
        cache: "TileCache | None" = None,
    ) -> None:
        self._images, self._shape, self._name, self.cache = images, shape, name, cache
        self.counts = [shape.count(*upright_size(data, _title(data))) for data in images]

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def cut_bytes(self) -> int:
        """Bytes of the tiles, once they are cut."""
        return len(self) * self._shape.tile_size**2 * 3

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        tiles = self.cut() if self.cache is None else self.cache.get(self)
        return tiles if dtype is None else tiles.astype(dtype, copy=False)

    def cut(self) -> np.ndarray:
        """Cut the tiles.

        Raises:
            ValueError: a picture cannot be decoded, or is not what it was when it was counted; the
                message starts with the sample's name.
        """
        size = self._shape.tile_size
        try:
            tiles = [tile for data in self._images for tile in self._shape.cut(data)]
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._name}: {error}" if self._name else str(error)) from error
        if len(tiles) != len(self):
            raise ValueError(
                f"{self._name}: its pictures have changed: {len(tiles)} tiles, not {len(self)}"
            )
        return np.stack(tiles) if tiles else np.zeros((0, size, size, 3), dtype=np.uint8)

    def verify(self) -> None:
        """Read all data of the pictures.

        Raises:
            TruncatedImage: the file of one ends early, and the shape does not accept that.
            ValueError: one cannot be decoded.
        """
        for data in self._images:
            verify_image(data, _title(data), truncated=self._shape.pictures.truncated)


def _title(data: bytes) -> str:
    return f"image of {len(data)} bytes"


class TileCache:
    """Cuts tiles, in the background where it is told what comes next; keeps the latest ones.

    The background threads end when they have nothing to do. They cut no more than half of what is
    kept before it is asked for, and go on as it is. An error in one of them is raised by `get`.

    Args:
        kept_bytes: most bytes of tiles that are kept.
        threads: that cut in the background.

    Attributes:
        held_bytes: bytes of the tiles that are kept.
        workers: the threads that are at work.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES, threads: int | None = None) -> None:
        self._most, self._threads = kept_bytes, threads or min(4, cores_of_rank())
        self.held_bytes, self._changed = 0, threading.Condition()
        self._kept: OrderedDict[PictureTiles, np.ndarray | Exception] = OrderedDict()
        self._next: OrderedDict[PictureTiles, None] = OrderedDict()
        self._in_work: set[PictureTiles] = set()
        self._ahead: set[PictureTiles] = set()
        self.workers: set[threading.Thread] = set()

    def ahead(self, coming: Iterable[PictureTiles]) -> None:
        """Cut these in the background, in this order, after what is waiting already."""
        with self._changed:
            for tiles in coming:
                if len(tiles) and tiles not in self._kept and tiles not in self._in_work:
                    self._next.setdefault(tiles)
            self._start()

    def get(self, tiles: PictureTiles) -> np.ndarray:
        """Return the tiles, uint8 [n, S, S, 3], not to be written to; raises as their `cut`."""
        with self._changed:
            self._changed.wait_for(lambda: tiles not in self._in_work)
            self._next.pop(tiles, None)
            found = self._kept.get(tiles)
            if found is None:
                self._ahead.clear()  # what was foreseen did not come: it may go
                self._in_work.add(tiles)
            else:
                self._ahead.discard(tiles)
                self._kept.move_to_end(tiles)
            self._start()
        if found is None:
            found = self._cut(tiles)
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def waiting(self) -> int:
        """Samples whose tiles are still to be cut in the background."""
        return len(self._next)

    def close(self) -> None:
        """End the background threads and forget all tiles."""
        with self._changed:
            self._next.clear()
            workers = list(self.workers)
        for worker in workers:
            worker.join()
        with self._changed:
            self._kept.clear()
            self._ahead.clear()
            self.held_bytes = 0

    def _start(self) -> None:
        """Start the threads that there is work for; the lock is held."""
        for _ in range(min(self._threads - len(self.workers), len(self._next))):
            if not self._has_room():
                return
            worker = threading.Thread(target=self._work, name="tiles", daemon=True)
            self.workers.add(worker)
            worker.start()

    def _has_room(self) -> bool:
        """Whether more may be cut before it is asked for; the lock is held."""
        if not self._next:
            return False
        begun = self._ahead | self._in_work
        first = next(iter(self._next))
        return not begun or sum(one.cut_bytes for one in begun) + first.cut_bytes <= self._most // 2

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._has_room():
                    self.workers.discard(threading.current_thread())
                    return
                tiles, _ = self._next.popitem(last=False)
                self._in_work.add(tiles)
            self._cut(tiles, ahead=True)

    def _cut(self, tiles: PictureTiles, *, ahead: bool = False) -> np.ndarray | Exception:
        """Cut and keep; `ahead`: nobody has asked yet."""
        found: np.ndarray | Exception
        try:
            found = tiles.cut()
        except Exception as error:
            found = error
        except BaseException:  # an interrupt: others must not wait for these tiles
            with self._changed:
                self._in_work.discard(tiles)
                self._changed.notify_all()
            raise
        with self._changed:
            self._in_work.discard(tiles)
            self._kept[tiles] = found
            if ahead:
                self._ahead.add(tiles)
            self.held_bytes += tiles.cut_bytes
            while self.held_bytes > self._most:
                oldest, _ = self._kept.popitem(last=False)
                self._ahead.discard(oldest)
                self.held_bytes -= oldest.cut_bytes
            self._changed.notify_all()
        return found
