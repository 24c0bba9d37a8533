"""Pictures as clients send them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def data_url(image: Image.Image | bytes, format: str = "PNG", **options: Any) -> str:
    data = image if isinstance(image, bytes) else encoded(image, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"


def user(text: str, *images: Image.Image | bytes | str) -> dict[str, Any]:
    """A user message."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    return {
        "role": "user",
        "content": [
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            {"type": "text", "text": text},
        ],
    }
