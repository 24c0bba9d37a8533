"""The one door through which images enter: bytes, files and data URLs become RGB as a person would see them, or one
sentence.

- first frame only; EXIF orientation applied; transparency on white, as browsers show it;
- 16-bit greys span 0 to 65535. Floats and 32-bit integers have no range of their own, so their values decide: within 0
to 1 (floats) that is black to
  white, else within 0 to 255, else within 0 to 65535; anything else is stretched from its least to its greatest value.
  Rounded to 8 bit; NaN is the least;
- sizes, and every buffer a decoder will allocate, are checked before it starts (`quota.core.image_files`).

Pillow and numpy are imported when the first image comes.
"""

from __future__ import annotations

import binascii
import io
import os
import re
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quota.core.documents import read_some
from quota.core.errors import ImageError
from quota.core.image_files import Malformed, Survey, survey

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 50  # a processor scales the short edge up, so a 1 x 4000 strip would become gigabytes
_BAND_PIXELS = 1 << 20  # converted at a time where numbers are wider than 8 bits
_DATA_URL = re.compile(
    r"data:(?:[\w.+-]{1,127}/[\w.+-]{1,127})?(?:;[\w.+-]{1,127}=[\w.+-]{1,127}){0,8};base64,", re.ASCII | re.IGNORECASE
)
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True)
class Limits:
    """encoded_bytes: of a file or a data URL's content. pixels: of an image, and of what its tiles cover. decode_bytes:
    all buffers of a decoder at once."""

    encoded_bytes: int = 256 << 20
    pixels: int = 40_000_000
    decode_bytes: int = 1 << 30


LIMITS = Limits()


def read_file(path: str | Path, limits: Limits = LIMITS, name: str = "image") -> bytes:
    """The bytes of a regular file; nothing waits for a pipe or a device. ImageError, which begins with `name`, says why
    it cannot be read."""
    try:
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        )
        with open(handle, "rb") as file:  # noqa: PTH123  (a handle, not a path)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ImageError(f"{name}: {path} is not a regular file; expected an image file")
            data = read_some(file, limits.encoded_bytes + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ImageError(f"{name}: {path} cannot be read ({reason})") from None
    return _bounded(data, limits, name)


def read_data_url(url: str, limits: Limits = LIMITS, name: str = "image") -> bytes:
    """The bytes in `data:image/...;base64,...`; ImageError for anything else."""
    header = _DATA_URL.match(url)
    if header is None:
        raise ImageError(f"{name}: expected data:image/...;base64,..., got {url[:40]!r}")
    if (len(url) - header.end()) * 3 // 4 > limits.encoded_bytes + 2:
        raise _too_many_bytes(limits, name)
    try:
        data = binascii.a2b_base64(url[header.end() :], strict_mode=True)
    except ValueError as error:
        raise ImageError(f"{name}: the data URL is not valid base64 ({error})") from None
    return _bounded(data, limits, name)


def _bounded(data: bytes, limits: Limits, name: str) -> bytes:
    if len(data) > limits.encoded_bytes:
        raise _too_many_bytes(limits, name)
    return data


def _too_many_bytes(limits: Limits, name: str) -> ImageError:
    return ImageError(f"{name}: the image has more than {limits.encoded_bytes} bytes; make it smaller", too_large=True)


def open_file(path: str | Path, limits: Limits = LIMITS, name: str = "image") -> Image:
    """`read_file` and `decode`; the error names the file."""
    return decode(read_file(path, limits, name), limits, f"{name}: {path}")


def inspect(data: bytes, limits: Limits = LIMITS, name: str = "image") -> Survey:
    """What decoding would take, checked against the limits; nothing is decoded. ImageError as for `decode`."""
    try:
        found = survey(data)
    except Malformed as error:
        raise _unreadable(str(error), name) from None
    check_size(found.size, limits, name)
    width, height = found.size
    if found.work_pixels > limits.pixels:
        raise ImageError(
            f"{name}: the tiles of this {width} x {height} image cover {found.work_pixels} pixels, the limit is"
            f" {limits.pixels}; save it without tiles",
            too_large=True,
        )
    if found.peak_bytes > limits.decode_bytes:
        raise ImageError(
            f"{name}: decoding the {width} x {height} image may take {found.peak_bytes} bytes, the limit is"
            f" {limits.decode_bytes}; make it smaller",
            too_large=True,
        )
    return found


def check_size(size: tuple[int, int], limits: Limits = LIMITS, name: str = "image") -> None:
    """ImageError for an empty image, too many pixels, or a side more than 50 times the other."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is empty")
    if width * height > limits.pixels:
        raise ImageError(
            f"{name}: the image has {width} x {height} pixels, the limit is {limits.pixels}; make it smaller",
            too_large=True,
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{name}: the image is {width} x {height}; one side may be at most {MAX_ASPECT} times the other; cut it"
        )


def decode(data: bytes, limits: Limits = LIMITS, name: str = "image") -> Image:
    """RGB, upright, on white. ImageError, which begins with `name`, says why not: not an image, or over a limit."""
    found = inspect(data, limits, name)
    from PIL import Image as pillow

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pillow.open(io.BytesIO(found.data), formats=(found.format,)) as image:
                if image.size != found.size and image.size != found.size[::-1]:  # Pillow turns a TIFF itself
                    raise _unreadable(f"its size is {found.size} or {image.size}", name)
                image.load()
                return to_rgb(image)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"{name}: decoding the image takes too much memory; make it smaller", too_large=True) from None
    except Exception as error:  # decoders raise whatever broken bytes make them raise
        reason = " ".join(str(error).split(" <", maxsplit=1)[0].split()) or type(error).__name__
        raise _unreadable(reason, name) from None


def to_image(given: object, limits: Limits = LIMITS, name: str = "image") -> Image:
    """Whatever holds an image as RGB, upright, on white: a Pillow image, a path, the bytes of a file, a data URL, or an
    array uint8 [H, W] of greys, [H, W, 3] of RGB or [H, W, 4] of RGBA. ImageError, which begins with `name`, says why
    not."""
    from PIL import Image as pillow

    if isinstance(given, (bytes, bytearray, memoryview)):
        return decode(_bounded(bytes(given), limits, name), limits, name)
    if isinstance(given, str) and given[:5].lower() == "data:":
        return decode(read_data_url(given, limits, name), limits, name)
    if isinstance(given, (str, Path)):
        return open_file(given, limits, name)
    image = given if isinstance(given, pillow.Image) else _of_array(given, name)
    check_size(image.size, limits, name)
    try:
        return to_rgb(image)  # a file that Pillow has opened is decoded here
    except OSError as error:
        raise _unreadable(str(error), name) from None


def _of_array(given: object, name: str) -> Image:
    import numpy as np
    from PIL import Image as pillow

    if not hasattr(given, "__array__"):
        raise ImageError(
            f"{name}: expected a Pillow image, a path, bytes, a data URL or an array, got {type(given).__name__}"
        )
    array = np.asarray(given)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"{name}: expected an array uint8 [H, W], [H, W, 3] or [H, W, 4], got {array.dtype} {list(array.shape)}"
        )
    if not array.size:
        raise ImageError(f"{name}: the image is empty")
    return pillow.fromarray(np.ascontiguousarray(array))


def _unreadable(reason: str, name: str) -> ImageError:
    return ImageError(
        f"{name}: not a readable image ({reason}); expected an intact {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    )


def to_rgb(image: Image) -> Image:
    """A Pillow image of any mode as RGB: 8 bit, on white, upright. An RGB image that is upright and opaque is returned
    as it is."""
    orientation = _orientation(image.info.get("exif"))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _on_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in _UPRIGHT:
        from PIL.Image import Transpose

        image = image.transpose(Transpose[_UPRIGHT[orientation]])
        image.info.pop("exif", None)
    return image


def _on_white(image: Image) -> Image:
    from PIL import Image as pillow

    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):
        return layer.convert("RGB")
    return pillow.alpha_composite(pillow.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _eight_bit(image: Image) -> Image:
    """Grey of more than 8 bits as L, band by band; a transparent value becomes white."""
    import numpy as np
    from PIL import Image as pillow

    rows = max(1, _BAND_PIXELS // image.width)
    bands = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range(image, bands)
    scale = 255.0 / (high - low) if high > low else 0.0
    transparent = image.info.get("transparency")
    grey = pillow.new("L", image.size)
    for box in bands:
        wide = np.asarray(image.crop(box))
        values = np.nan_to_num(wide.astype(np.float64), copy=False, nan=low, posinf=high, neginf=low)
        band = np.clip(np.floor((values - low) * scale + 0.5), 0, 255).astype(np.uint8)
        if isinstance(transparent, int):
            band[wide == transparent] = 255
        grey.paste(pillow.fromarray(band), box)
    return grey


def _range(image: Image, bands: list[tuple[int, int, int, int]]) -> tuple[float, float]:
    """(what becomes black, what becomes white) of floats or 32-bit integers."""
    import numpy as np

    lows, highs = [], []
    for box in bands:
        values = np.asarray(image.crop(box))
        finite = values[np.isfinite(values)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    low, high = min(lows, default=0.0), max(highs, default=0.0)
    tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    return (0.0, top) if top is not None else (low, high)


def _orientation(exif: Any) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or it cannot be read."""
    if not isinstance(exif, bytes):
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for number in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * number)
            if tag == 0x0112:
                return int(value) if kind == 3 and count == 1 and value in _UPRIGHT else 1
    except struct.error:
        return 1
    return 1
