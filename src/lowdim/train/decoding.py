"""Image files as pixels of eight bits: grey, palette, transparent, 16-bit, CMYK, rotated and animated ones alike."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, MissingExtraError, cut, listed

__all__ = ["SUFFIXES", "Decoded", "decode", "decode_all", "pillow", "short_name"]

#: Formats that are read. Others of Pillow run programs (EPS), or hold no single picture.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".jp2", ".j2k",
})  # fmt: skip
_MOST_PIXELS = 2**27  # of one image: 400 MB in memory
_WORKERS = 8


@dataclass(frozen=True)
class Decoded:
    """What is known of an image that was read once.

    Attributes:
        key: of its pixels; images with equal pixels share it.
        see_through, animated: whether something of it is left out: transparency, and all frames but the first.
        failure: why it cannot be read; empty if it can.
    """

    key: bytes = b""
    see_through: bool = False
    animated: bool = False
    failure: str = ""


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("pillow", "image", "reading images")
    from PIL import Image

    return Image


def decode(path: str | Path, channels: int = 3) -> Any:
    """The first frame of an image file, upright, as a Pillow image of mode RGB (or L, for one channel).

    16 bits become 8 (`round(value / 257)`), numbers between 0 and 1 become 0 to 255, and transparency is dropped as
    transformers' processors do it.

    Args:
        channels: 3, or 1 for models of grey images.

    Raises:
        ValueError, OSError: it is no image, damaged, or holds numbers whose range is not known.
    """
    with _opened(path) as image:
        return _converted(image, channels)


def decode_all(paths: Sequence[str | Path], channels: int = 3) -> list[Decoded]:
    """Read every image once, several at a time; only what `Decoded` holds is kept.

    Raises:
        DataError: some cannot be read (how many, and the first few by name).
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # of Pillow, about metadata
        found = list(_in_turn(pool, paths, channels))
    damaged = [(path, each.failure) for path, each in zip(paths, found) if each.failure]
    if damaged:
        first = listed((f"{short_name(path)} ({failure})" for path, failure in damaged), 600)
        raise DataError(f"{len(damaged)} of {len(paths)} images cannot be read: {first}; repair or remove them")
    return found


def short_name(path: str | Path) -> str:
    """The name of a file with that of its folder, which is often its class."""
    return "/".join(Path(path).parts[-2:])


def _in_turn(pool: ThreadPoolExecutor, paths: Iterable[str | Path], channels: int) -> Iterator[Decoded]:
    return pool.map(lambda path: _looked_at(path, channels), paths)


def _looked_at(path: str | Path, channels: int) -> Decoded:
    try:
        with _opened(path) as image:
            animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # MPO: a photo with its preview
            image.seek(0)
            see_through = image.has_transparency_data
            pixels = _converted(image, channels)
    except Exception as error:  # noqa: BLE001 - a damaged file makes Pillow raise errors of many kinds
        return Decoded(failure=_reason(error))
    digest = hashlib.blake2b(f"{pixels.mode} {pixels.size}".encode(), digest_size=16, person=b"pixels")
    digest.update(pixels.tobytes())
    return Decoded(digest.digest(), see_through, animated)


def _opened(path: str | Path) -> Any:
    Image = pillow()
    Image.init()
    image = Image.open(path, formats=[kind for kind in _FORMATS if kind in Image.OPEN])
    width, height = image.size
    if width * height > _MOST_PIXELS:
        image.close()
        raise ValueError(f"{width} x {height} pixels are more than {_MOST_PIXELS:,}")
    return image


def _converted(image: Any, channels: int) -> Any:
    from PIL import ImageOps

    image.load()
    wide = image.mode == "I" and image.format not in ("PPM", "PNG")  # those two hold 16 bits as such numbers
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _of_eight_bits(image, wide=wide)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _of_eight_bits(image: Any, *, wide: bool) -> Any:
    """An image of 16 bits, or of floating numbers between 0 and 1, with 8 bits.

    Raises:
        ValueError: other numbers, of which nobody knows what is black and what is white.
    """
    import numpy

    values = numpy.asarray(image).astype(numpy.float64)
    low, high = float(values.min()), float(values.max())
    most = 1.0 if image.mode == "F" else 65535.0
    if wide or not (low >= 0 and high <= most):  # also for NaN
        raise ValueError(f"its numbers are {low:g} to {high:g}, which tell no black from white; save it with 8 or 16 bits")
    return pillow().fromarray(numpy.rint(values * (255 / most)).astype(numpy.uint8))


def _reason(error: Exception) -> str:
    if "cannot identify image file" in str(error):
        return "it is no image of a known format"
    return cut(" ".join(str(error).split()), 120) or type(error).__name__
