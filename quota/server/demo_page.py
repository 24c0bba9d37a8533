"""The page at /demo: static files over the public API, and a few drawn images to try."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from fastapi import FastAPI, Response

from quota.scenes import generate as g
from quota.server.errors import ApiError

_FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
_HERE = Path(__file__).with_name("demo")
_SAMPLES = 12
_SAMPLE_PX = 336
# nothing from elsewhere, nothing inline; the image is read in the page
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@cache
def _file(name: str) -> bytes:
    return (_HERE / name).read_bytes()


@cache
def sample(number: int) -> tuple[bytes, str]:
    """(PNG, question) of held-out scene `number`."""
    scene, out = g.scene("test", number, _SAMPLE_PX), io.BytesIO()
    g.draw(scene).save(out, "PNG")
    asked = g.questions(scene)
    return out.getvalue(), asked[number % len(asked)].text


def add_demo(app: FastAPI) -> None:
    """Routes of the page. They need no key: they hold nothing of the model, and what the page asks needs one."""

    @app.get("/demo")
    async def page() -> Response:
        return Response(_file("index.html"), media_type=_FILES["index.html"], headers=_HEADERS)

    @app.get("/demo/{name}")
    async def file(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, f"/demo/{name} does not exist", code="unknown_url")
        return Response(_file(name), media_type=_FILES[name], headers=_HEADERS)

    @app.get("/demo/samples/{number}.png")
    async def image(number: str) -> Response:
        if not (number.isascii() and number.isdigit() and len(number) < 9):
            raise ApiError(404, "/demo/samples/: expected a number", code="unknown_url")
        png, question = sample(int(number) % _SAMPLES)
        return Response(png, media_type="image/png", headers=_HEADERS | {"x-question": question})
