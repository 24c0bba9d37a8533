"""A process that decodes images for a server, and can be ended at any moment. Started by `quota.server.images`; imports
neither torch nor fastapi.

It reads requests from its standard input (`REQUEST`, then the encoded image) and answers each on its standard output
(`ANSWER`, then rows of RGB, or a sentence). It has a limit on memory for its whole life and one on processor time per
image; the kernel ends it when the second is over, inside a decoder too. It ends by itself when its input does.
"""

from __future__ import annotations

import contextlib
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

from quota.core import images
from quota.core.errors import ImageError
from quota.core.malloc import return_freed_memory

REQUEST = struct.Struct(
    "<QQQd"
)  # encoded bytes that follow, most pixels of the image, pixels from which it is called large, processor seconds
ANSWER = struct.Struct("<BII")  # status; width and height, or bytes of the sentence and 0
DECODED, REFUSED, TOO_LARGE, LARGE = range(4)
BAND_PIXELS = 1 << 20  # sent at a time
_OWN_BYTES = 64 << 20  # of the interpreter, over what it has at its start


def band_rows(width: int) -> int:
    """Rows that are sent at a time."""
    return max(1, BAND_PIXELS // width)


def main() -> None:
    encoded_bytes, decode_bytes = (int(text) for text in sys.argv[1:3])
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a whole process group may get them: the server decides what they mean
        signal.signal(number, signal.SIG_IGN)
    from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    Image.preinit()  # the other formats
    _limit_memory(decode_bytes + 2 * encoded_bytes + _OWN_BYTES)
    with contextlib.suppress(BrokenPipeError):
        while len(head := sys.stdin.buffer.read(REQUEST.size)) == REQUEST.size:
            size_bytes, pixels, large_pixels, seconds = REQUEST.unpack(head)
            data = sys.stdin.buffer.read(size_bytes)
            _answer(data, images.Limits(encoded_bytes, pixels, decode_bytes), large_pixels, seconds, sys.stdout.buffer)


def _answer(data: bytes, limits: images.Limits, large_pixels: int, seconds: float, out: BinaryIO) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles SIGPROF, so it ends the process
    try:
        if images.inspect(data, limits, "image_url").work_pixels > large_pixels:
            out.write(ANSWER.pack(LARGE, 0, 0))
            out.flush()
            return
        image = images.decode(data, limits, "image_url")
    except ImageError as error:
        sentence = str(error).encode()
        out.write(ANSWER.pack(TOO_LARGE if error.too_large else REFUSED, len(sentence), 0) + sentence)
        out.flush()
        return
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    del data
    out.write(ANSWER.pack(DECODED, *image.size))
    rows = band_rows(image.width)
    for top in range(0, image.height, rows):
        out.write(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    out.flush()
    if image.width * image.height > BAND_PIXELS:
        del image
        return_freed_memory()


def _limit_memory(more_bytes: int) -> None:
    """At most so much memory more than now, where the kernel counts it (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    now = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, now + more_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
