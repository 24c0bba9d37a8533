"""Pictures from a request: decoded within limits, whatever the bytes are."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from typing import Any

from PIL import Image

from quota.server.config import Settings
from quota.server.errors import ApiError
from quota.server.remote import fetch

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 50  # the processor scales the short edge up, so a 1 x 4000 strip would become gigabytes
_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)


def load_image(url: str, settings: Settings) -> Image.Image:
    """An RGB picture from a data URL, or from an allowed host. ApiError 400 says what is wrong with it."""
    return decode_image(_bytes_of(url, settings), settings.max_image_pixels)


def _bytes_of(url: str, settings: Settings) -> bytes:
    if url[:5].lower() != "data:":
        return fetch(url, settings.image_hosts, settings.max_image_bytes, settings.image_timeout_s)
    header = _DATA_URL.match(url)
    if header is None:
        raise _bad("expected data:image/...;base64,... in image_url.url")
    if (len(url) - header.end()) * 3 // 4 > settings.max_image_bytes:
        raise _bad(f"the picture has more than {settings.max_image_bytes} bytes", "image_too_large")
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _bad("the data URL is not valid base64") from None


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """First frame as RGB. Sizes are checked before pixels are decoded; 16-bit greys are scaled, not cut."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.size, max_pixels)
                image.load()
                return _as_rgb(image)
    except ApiError:
        raise
    except Exception as error:  # decoders raise whatever broken bytes make them raise
        reason = str(error).split(" <", maxsplit=1)[0] or type(error).__name__
        raise _bad(f"not a readable picture ({reason}); expected one of {', '.join(FORMATS)}") from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _bad("the picture is empty")
    if width * height > max_pixels:
        raise _bad(f"the picture has {width} x {height} pixels, the limit is {max_pixels}", "image_too_large")
    if max(size) > MAX_ASPECT * min(size):
        raise _bad(f"the picture is {width} x {height}; one side may be at most {MAX_ASPECT} times the other")


def _as_rgb(image: Any) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        wide = image.convert("F")
        low, high = wide.getextrema()
        top = 255.0 if low >= 0 and high <= 255 else 65535.0
        image = wide.point(lambda value: value * (255.0 / top)).convert("L")
    rgb: Image.Image = image.convert("RGB")
    return rgb


def _bad(message: str, code: str = "invalid_image") -> ApiError:
    return ApiError(400, f"image_url: {message}", code=code, param="messages")
