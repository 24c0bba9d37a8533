"""Requests as many clients would send them, every one determined by its number: pictures of all kinds, chats, plain
text, wrong bodies."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

QUESTIONS = (
    "what color is the star ?",
    "describe the picture .",
    "which shape is in the top left ?",
    "how many objects are there ?",
    "is there a red circle ?",
    "what is above the blue square ?",
    "where is the ring ?",
)
MODES = ("RGB", "L", "LA", "RGBA", "P", "CMYK", "I;16", "1")
MAX_ASPECT = 50


@dataclass(frozen=True)
class Asked:
    """A body, and what has to come of it: "answer", "refusal" (a 4xx) or "leave" (the client hangs up)."""

    number: int
    body: dict[str, Any] | bytes
    expected: str


def image_bytes(rng: random.Random, largest: tuple[int, int] = (4000, 3000)) -> bytes:
    """An encoded picture of random size, mode and format; small ones are likelier, and one in a hundred is 1 x 1 or as
    large as may be. Never a strip the server refuses."""
    width, height = (max(1, int(limit ** rng.random())) for limit in largest)
    width, height = max(width, -(-height // MAX_ASPECT)), max(height, -(-width // MAX_ASPECT))
    if rng.random() < 0.01:
        width, height = rng.choice(((1, 1), largest))
    mode = rng.choice(MODES)
    image = _noise(rng, -(-width // 8), -(-height // 8)).resize((width, height), Image.Resampling.NEAREST)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    plain = width * height < 2_000_000  # larger ones without good compression pass the server's limit of bytes
    if mode == "CMYK":
        image.save(buffer, rng.choice(("JPEG", "TIFF")) if plain else "JPEG")
    elif mode in ("RGB", "L") and rng.random() < 0.5:
        image.save(buffer, rng.choice(("JPEG", "WEBP", "BMP")) if plain else "WEBP")
    elif mode == "P" and plain and rng.random() < 0.5:
        image.save(buffer, "GIF", save_all=True, append_images=[image.rotate(90 * i) for i in range(1, 3)])
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _noise(rng: random.Random, width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def request(number: int, model: str, max_tokens: int = 24) -> Asked:
    """Request `number` of the mixed load: 10 % malformed, 10 % abandoned, the rest of every kind."""
    rng = random.Random(number)
    kind = rng.random()
    if kind < 0.1:
        return Asked(number, _malformed(rng, model), "refusal")
    pictures = [image_bytes(rng) for _ in range(rng.choice((0, 1, 1, 1, 1, 2)))]
    messages = [user(rng.choice(QUESTIONS), *pictures)]
    if rng.random() < 0.2:
        messages.insert(0, {"role": "system", "content": "answer with yes or no ."})
    if rng.random() < 0.2:
        messages += [{"role": "assistant", "content": "a red star ."}, user(rng.choice(QUESTIONS))]
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": rng.randint(1, max_tokens),
        "stream": rng.random() < 0.5,
    }
    body |= rng.choice(
        (
            {"temperature": 0},
            {"temperature": 1.0, "seed": number},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": number, "n": 2},
        )
    )
    if rng.random() < 0.2:
        body["stop"] = [" the", "."]
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
    if rng.random() < 0.3:
        body |= rng.choice(({"recipe": "none"}, {"keep": round(rng.uniform(0.05, 1.0), 2)}))
    if kind < 0.2:
        return Asked(number, {**body, "stream": rng.random() < 0.7, "max_tokens": 400, "temperature": 2.0}, "leave")
    return Asked(number, body, "answer")


def _malformed(rng: random.Random, model: str) -> dict[str, Any] | bytes:
    header = image_bytes(rng, (200, 200))[: rng.randint(1, 24)]
    buffer = io.BytesIO()
    _noise(rng, 64, 64).save(buffer, rng.choice(("PNG", "JPEG")))
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    good = {"model": model, "messages": [user("yes ?")]}
    return rng.choice(
        (
            b"{",
            b"",
            b"\xff",
            b'{"model": 3}',
            {**good, "messages": []},
            {**good, "temperature": 9},
            {**good, "messages": [user("x", header)]},
            {**good, "messages": [user("x", half)]},
            {**good, "model": "another"},
            {**good, "no_such_field": 1},
            {**good, "messages": [user("see <image> here")]},
            {**good, "max_tokens": -1},
            {**good, "messages": [user("x", b"not a picture")]},
            {**good, "messages": [user("yes " * 20_000)]},
            {
                **good,
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}
                ],
            },
        )
    )
