"""Images of requests, decoded in processes that can be ended: one slow or greedy image costs its own request
alone.

A request first tries the common way: every image within `LARGE_PIXELS` and a fraction of a second. One that needs more
moves to another queue, which never takes the last process, so that ordinary images go on. Few requests hold decoded
images at a time, and hold them until their prompt is made; clients take turns at these places and at the processes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from PIL import Image

from quota.core import images
from quota.core.errors import ImageError
from quota.server.config import Settings
from quota.server.decoder import ANSWER, DECODED, LARGE, REFUSED, REQUEST, band_rows
from quota.server.errors import ApiError
from quota.server.lane import Places
from quota.server.remote import fetch

LARGE_PIXELS = 4_000_000  # an image of more goes to the other queue
_QUICK_S = 0.5  # processor time after which an image goes there too
_WALL = 10  # a process that got so little of the processor that this many times its limit have passed is ended too
_REMOTE = 4  # requests that fetch images at a time


_Result = TypeVar("_Result")


class Lost(Exception):
    """The process ended before it had answered. `reason`: time or died."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Worker:
    """One decoding process, which does one thing at a time."""

    def __init__(self, settings: Settings) -> None:
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        # nothing of the server's environment: API keys are in it
        environment = {
            "PYTHONPATH": paths,
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": os.environ.get("PATH", os.defpath),
        }
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        command = [
            sys.executable,
            "-m",
            "quota.server.decoder",
            str(settings.max_image_bytes),
            str(settings.image_decode_bytes),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )

    def ask(self, data: bytes, pixels: int, large_pixels: int, seconds: float) -> Image.Image | None:
        """The image as RGB; None when it has more than `large_pixels`. ImageError when it is refused, Lost when the
        process ends over it. Blocks."""
        try:
            given, taken = cast("BinaryIO", self.process.stdin), cast("BinaryIO", self.process.stdout)
            given.write(REQUEST.pack(len(data), pixels, large_pixels, seconds))
            given.write(data)
            given.flush()
            status, width, height = ANSWER.unpack(_exactly(taken, ANSWER.size))
            if status == LARGE:
                return None
            if status != DECODED:
                raise ImageError(_exactly(taken, width).decode(), too_large=status != REFUSED)
            image = Image.new("RGB", (width, height))
            rows = band_rows(width)
            for top in range(0, height, rows):
                size = width, min(rows, height - top)
                image.paste(Image.frombytes("RGB", size, _exactly(taken, 3 * size[0] * size[1])), (0, top))
            return image
        except (OSError, EOFError, ValueError):
            self.process.kill()
            raise Lost("time" if self.process.wait() == -signal.SIGPROF else "died") from None

    def end(self) -> None:
        """At once, whatever it does. A thread inside `ask` gets Lost."""
        self.process.kill()


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


class Decoders:
    """`lost` is called with the reason a process was replaced: time, died or left (its request is gone)."""

    def __init__(self, settings: Settings, lost: Callable[[str], None]) -> None:
        self.settings, self._lost = settings, lost
        self._limits = images.Limits(settings.max_image_bytes, settings.max_image_pixels, settings.image_decode_bytes)
        count = settings.image_workers
        self._idle = [Worker(settings) for _ in range(count)]
        self._busy: set[Worker] = set()
        self._closed = False
        self._free, self._few, self._large = (
            Places(count),
            Places(2 * count),
            Places(count - 1),
        )
        self._remote = Places(_REMOTE)
        self._threads = ThreadPoolExecutor(max_workers=4 * count + _REMOTE, thread_name_prefix="quota-images")

    @property
    def processes(self) -> list[int]:
        """Their ids."""
        return [worker.process.pid for worker in (*self._idle, *self._busy)]

    @asynccontextmanager
    async def opened(self, urls: Sequence[str], client: str) -> AsyncGenerator[tuple[list[Image.Image], bool]]:
        """(RGB images of data URLs or of allowed hosts, whether they are large); they are to be let go on exit.
        ApiError 400 says what is wrong."""
        fetched: dict[str, bytes] = {}
        async with self._remote.one(client) if any(not _is_data(url) for url in urls) else nullcontext():
            for url in urls:
                if not _is_data(url):
                    fetched[url] = await self._off_loop(self._fetch, url)
            async with self._few.one(client):
                found = await self._all(urls, fetched, client, large=False)
                if found is not None:
                    yield found, False
                    return
            async with self._large.one(client):
                found = await self._all(urls, fetched, client, large=True)
                yield found or [], True

    def close(self) -> None:
        """End all processes at once, busy or not."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            worker.end()
        self._threads.shutdown(wait=False)

    async def _all(
        self, urls: Sequence[str], fetched: dict[str, bytes], client: str, *, large: bool
    ) -> list[Image.Image] | None:
        found = []
        for url in urls:
            try:
                data = (
                    fetched[url]
                    if url in fetched
                    else await self._off_loop(images.read_data_url, url, self._limits, "image_url")
                )
                image = await self._decode(data, client, large=large)
            except ImageError as error:
                raise _bad(str(error), "image_too_large" if error.too_large else "invalid_image") from None
            if image is None:
                return None
            found.append(image)
        return found

    async def _decode(self, data: bytes, client: str, *, large: bool) -> Image.Image | None:
        """None when it needs the other queue."""
        limit = self.settings.image_decode_s
        seconds = limit if large else min(limit, _QUICK_S)
        async with self._free.one(client):
            worker = self._idle.pop()
            self._busy.add(worker)
            reason = "left"  # unless it answers, or says otherwise
            try:
                asked = self._off_loop(
                    worker.ask,
                    data,
                    self.settings.max_image_pixels,
                    self.settings.max_image_pixels if large else LARGE_PIXELS,
                    seconds,
                )
                try:
                    image = await asyncio.wait_for(asked, _WALL * max(1.0, seconds))
                except TimeoutError:
                    raise Lost("time") from None
                reason = ""
                return image
            except ImageError:
                reason = ""
                raise
            except Lost as error:
                reason = error.reason
                if not large:
                    return None
                what = f"takes more than {limit:g} s of processor time" if reason == "time" else "ended its decoder"
                raise _bad(f"image_url: decoding the image {what}; make it smaller, or save it as PNG") from None
            finally:
                self._busy.discard(worker)
                if reason:
                    worker.end()
                    self._lost(reason)
                    if not self._closed:
                        with suppress(OSError):  # no process can be made now: the next request replaces the dead one
                            worker = Worker(self.settings)
                self._idle.append(worker)

    def _off_loop(self, function: Callable[..., _Result], *args: object) -> asyncio.Future[_Result]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _fetch(self, url: str) -> bytes:
        return fetch(url, self.settings.image_hosts, self.settings.max_image_bytes, self.settings.image_timeout_s)


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _bad(message: str, code: str = "invalid_image") -> ApiError:
    return ApiError(400, message, code=code, param="messages")
