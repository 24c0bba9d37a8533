"""What decoding an encoded image would take, read from its structure alone, and the parts of the file that decide its
pixels.

Everything else (texts, colour profiles, thumbnails, later frames, nested directories) is left out before a decoder sees
the file, so that none of it has to be bounded: unpacked texts of a PNG, thousands of application segments of a JPEG and
chains of TIFF directories are never read.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_SCANS = 64  # of a JPEG: each is another pass over all coefficients; encoders write 1 to about 20
_MAX_PIECES = (
    1 << 18
)  # chunks of a PNG, blocks of a GIF, strips or tiles of a TIFF, and values of any other of its fields
_MAX_SEGMENTS = 1 << 14  # of a JPEG; a colour profile takes at most 255
_MAX_RUN_LENGTH_PIXELS = 4_000_000  # of a BMP in run-length code, which Pillow decodes in Python
_MAX_SAMPLES, _MAX_BITS = 8, 64  # of a TIFF's pixel, of a sample
_RGB_BYTES = 4  # Pillow stores RGB with a fourth byte
_OUT_BYTES = 3 * _RGB_BYTES  # the image as decoded, as RGBA and on its ground, all three for a moment


class Malformed(ValueError):
    """The structure is not what the format says."""


@dataclass(frozen=True)
class Survey:
    """`size`: (width, height) as stored. `work_pixels`: what the decoder fills, at least width x height (tiles may
    reach beyond). `peak_bytes`: an upper bound on the memory of all buffers at once, the result among them. `data`:
    what the decoder needs of the file, as a file of the same format."""

    format: str
    size: tuple[int, int]
    work_pixels: int
    peak_bytes: int
    data: bytes


def survey(data: bytes) -> Survey:
    """Malformed says what is wrong. Time is linear in the bytes, memory a small multiple of them."""
    for magic, read in _READERS:
        if magic.match(data):
            try:
                return read(data)
            except (struct.error, IndexError):
                raise Malformed("it is truncated") from None
    raise Malformed("unknown format")


def _plan(format: str, size: tuple[int, int], data: bytes, extra_bytes: int, work_pixels: int = 0) -> Survey:
    pixels = size[0] * size[1]
    return Survey(format, size, max(pixels, work_pixels), pixels * _OUT_BYTES + extra_bytes, data)


# -- PNG ---------------------------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"eXIf")


def _png(data: bytes) -> Survey:
    kept: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    for kind, start, end in _png_chunks(data):
        if kind == b"IDAT":
            pixels.append(data[start:end])
        elif kind in _PNG_KEPT and (kind == b"eXIf" or not pixels):
            kept[kind] = data[start - 8 : end + 4]
    if b"IHDR" not in kept:
        raise Malformed("no header")
    width, height, depth, colours = struct.unpack_from(">IIBB", kept[b"IHDR"], 8)
    if b"tRNS" in kept:
        kept[b"tRNS"] = _png_transparency(kept[b"tRNS"], depth, colours)
    whole = b"".join(
        [
            _PNG,
            *(kept[kind] for kind in _PNG_KEPT if kind in kept),
            _png_chunk(b"IDAT", b"".join(pixels)),
            _png_chunk(b"IEND", b""),
        ]
    )
    return _plan("PNG", (width, height), whole, len(whole))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, one past the last) of every chunk that is there; the last may be cut short."""
    place = len(_PNG)
    for _ in range(_MAX_PIECES):
        if place + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            return
        yield kind, place + 8, min(place + 8 + length, len(data))
        place += 12 + length
    raise Malformed(f"more than {_MAX_PIECES} chunks")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _png_transparency(chunk: bytes, depth: int, colours: int) -> bytes:
    """The transparent value in the depth of the decoded samples: the file counts in its own, the decoder compares 8
    bits (but 16 in a 16-bit grey)."""
    body = chunk[8:-4]
    if colours == 0 and depth in (2, 4):
        (value,) = struct.unpack_from(">H", body)
        return _png_chunk(b"tRNS", struct.pack(">H", value * (255 // (2**depth - 1)) & 0xFF))
    if colours == 2 and depth == 16:
        return _png_chunk(b"tRNS", struct.pack(">3H", *(value >> 8 for value in struct.unpack_from(">3H", body))))
    return chunk


# -- JPEG --------------------------------------------------------------------------------------------------------------

_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # not those that restart a scan
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_ALONE = {0x01, 0xD8}  # markers without a segment


def _jpeg(data: bytes) -> Survey:
    head: dict[bytes, bytes] = {}
    tables: list[bytes] = []
    size, components, segments, scans, first_scan, progressive = (0, 0), 0, 0, 0, 0, False
    place = 2
    while (found := _JPEG_MARKER.search(data, place)) is not None:
        marker, place = found[1][0], found.end()
        if marker == 0xD9:
            break
        if marker in _ALONE:
            continue
        segments += 1
        if segments > _MAX_SEGMENTS:
            raise Malformed(f"more than {_MAX_SEGMENTS} segments")
        (length,) = struct.unpack_from(">H", data, place)
        segment = b"\xff" + data[place - 1 : place + length]
        if marker in _FRAMES:
            if components:
                raise Malformed("a second frame header")
            height, width, components = struct.unpack_from(">HHB", segment, 5)
            size, progressive = (width, height), marker not in (0xC0, 0xC1, 0xC9)
        if marker == 0xDA:
            scans += 1
            first_scan = first_scan or found.start()
            if scans > MAX_SCANS:
                raise Malformed(f"more than {MAX_SCANS} scans")
        elif not scans:
            _jpeg_head(marker, segment, head, tables)
        place += max(length, 2)
    if not components or not scans:
        raise Malformed("it is truncated")
    whole = b"".join([data[:2], *head.values(), *tables, data[first_scan:]])
    coefficients = size[0] * size[1] * components * 2 if progressive or scans > 1 else 0
    return _plan("JPEG", size, whole, coefficients + len(whole))


def _jpeg_head(marker: int, segment: bytes, head: dict[bytes, bytes], tables: list[bytes]) -> None:
    """Keep what comes before the first scan: frame and tables; of the application's segments those about colours, and
    the first about orientation."""
    if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
        head.setdefault(b"Exif", segment)
    elif (marker == 0xE0 and segment[4:8] == b"JFIF") or (marker == 0xEE and segment[4:9] == b"Adobe"):
        head[segment[4:8]] = segment
    elif not 0xE0 <= marker <= 0xEF and marker != 0xFE:
        tables.append(segment)


# -- GIF ---------------------------------------------------------------------------------------------------------------


def _gif(data: bytes) -> Survey:
    """Up to the first image: its own palette, transparency and place. An image beyond the screen enlarges it, as the
    decoder does."""
    place = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 128 else 0)
    head, control, blocks = data[:place], b"", 0
    while data[place : place + 1] != b",":
        if data[place] != 0x21:
            if data[place] == 0x3B or blocks >= _MAX_PIECES:
                raise Malformed("it holds no image")
            place, blocks = place + 1, blocks + 1  # the decoder passes over what is neither
            continue
        kind, start = data[place + 1], place
        place += 2
        while data[place] and blocks < _MAX_PIECES:
            place, blocks = place + 1 + data[place], blocks + 1
        if blocks == _MAX_PIECES:
            raise Malformed(f"more than {_MAX_PIECES} blocks before its image")
        place += 1
        if kind == 0xF9:
            control = data[start:place]
    left, top, width, height = struct.unpack_from("<4H", data, place + 1)
    screen = struct.unpack_from("<2H", data, 6)
    size = max(screen[0], left + width), max(screen[1], top + height)
    whole = head + (control if len(control) == 8 else b"") + data[place:]
    return _plan("GIF", size, whole, 2 * size[0] * size[1] + len(whole))


# -- WebP --------------------------------------------------------------------------------------------------------------


def _webp(data: bytes) -> Survey:
    """The canvas; libwebp refuses frames that do not lie within it. It holds two canvases and one frame, Pillow copies
    the result once."""
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (value & 0x3FFF for value in struct.unpack_from("<2H", data, 26))
    if len(data) < 30:
        raise Malformed("it is truncated")
    return _plan("WEBP", (width, height), data, 3 * _RGB_BYTES * width * height + len(data))


# -- BMP ---------------------------------------------------------------------------------------------------------------


def _bmp(data: bytes) -> Survey:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<Ii", data, 18)
    pixels = width * abs(height)
    run_length = header >= 40 and struct.unpack_from("<I", data, 30)[0] in (1, 2)
    if run_length and (pixels > _MAX_RUN_LENGTH_PIXELS or len(data) > 4 * pixels + 4096):
        raise Malformed(
            f"a BMP in run-length code is read up to {_MAX_RUN_LENGTH_PIXELS} pixels and 4 bytes each; save it as PNG"
        )
    return _plan("BMP", (width, abs(height)), data, 2 * pixels + len(data))


# -- TIFF --------------------------------------------------------------------------------------------------------------

# none, three of fax, LZW, JPEG, deflate (two numbers) and PackBits: decoders whose memory follows from the dimensions
_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)
_SCALARS = {
    256: None,
    257: None,
    259: 1,
    262: 0,
    266: 1,
    274: 1,
    277: 1,
    278: None,
    284: 1,
    322: None,
    323: None,
}  # tag: value when absent
_TIFF_KEPT = {*_SCALARS, 254, 258, 273, 279, 292, 293, 317, 320, 324, 325, 332, 338, 339, 347, 529, 530, 531, 532}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


def _tiff(data: bytes) -> Survey:
    """The first directory, written anew behind the file with the entries that decide pixels and nothing after it."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    counter, entry, pointer = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    (start,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + counter, data, start)
    if entries > len(data) // struct.calcsize("=" + entry):
        raise Malformed("it is truncated")
    kept: dict[int, tuple[int, int, bytes]] = {}
    outside = 0
    for number in range(entries):
        tag, kind, count, value = struct.unpack_from(
            order + entry, data, start + struct.calcsize("=" + counter) + number * struct.calcsize("=" + entry)
        )
        if tag not in _TIFF_KEPT:
            continue
        if tag in kept or kind not in _SIZES or not 0 < count <= _MAX_PIECES:
            raise Malformed(f"field {tag} of its directory is repeated, empty, too long or of an unknown type")
        kept[tag] = kind, count, value
        outside += _SIZES[kind] * count if _SIZES[kind] * count > len(value) else 0
    if outside > len(data):
        raise Malformed("its directory describes more than the file holds")
    pack = struct.Struct(order + entry).pack
    written = b"".join(pack(tag, *kept[tag]) for tag in sorted(kept))
    directory = struct.pack(order + counter, len(kept)) + written + struct.pack(order + pointer, 0)
    place = len(data) + len(data) % 2
    first = 16 if big else 8
    whole = b"".join(
        [
            data[: first - struct.calcsize("=" + pointer)],
            struct.pack(order + pointer, place),
            data[first:],
            bytes(len(data) % 2),
            directory,
        ]
    )
    return _tiff_plan({tag: _scalar(order, kept, tag) for tag in _SCALARS}, kept, _bits(order, data, kept), whole)


def _scalar(order: str, kept: dict[int, tuple[int, int, bytes]], tag: int) -> int | None:
    if tag not in kept:
        return _SCALARS[tag]
    kind, count, value = kept[tag]
    if kind not in _INTEGERS or count != 1:
        raise Malformed(f"field {tag} of its directory is not a number")
    return int(struct.unpack_from(order + _INTEGERS[kind], value)[0])


def _bits(order: str, data: bytes, kept: dict[int, tuple[int, int, bytes]]) -> int:
    """The most bits of any sample."""
    if 258 not in kept:
        return 1
    kind, count, value = kept[258]
    if kind not in _INTEGERS or count > _MAX_SAMPLES:
        raise Malformed("field 258 of its directory is not a number per sample")
    if _SIZES[kind] * count > len(value):
        (place,) = struct.unpack(order + ("Q" if len(value) == 8 else "I"), value)
        value = data[place : place + _SIZES[kind] * count]
    return int(max(struct.unpack_from(f"{order}{count}{_INTEGERS[kind]}", value)))


def _tiff_plan(
    fields: dict[int, int | None], kept: dict[int, tuple[int, int, bytes]], bits: int, whole: bytes
) -> Survey:
    width, height, samples = fields[256], fields[257], fields[277] or 1
    if not width or not height:
        raise Malformed("it has no dimensions")
    if fields[259] not in _COMPRESSIONS:
        raise Malformed(f"compression {fields[259]} of TIFF is not read; save it with deflate, LZW, JPEG or none")
    if bits > _MAX_BITS or samples > _MAX_SAMPLES:
        raise Malformed(f"{samples} samples of {bits} bits are not read")
    tiled = fields[322] is not None or fields[323] is not None or 324 in kept
    if tiled and 273 in kept:
        raise Malformed("it has strips and tiles")
    across, down = (fields[322], fields[323]) if tiled else (width, min(fields[278] or height, height))
    if not across or not down:
        raise Malformed("its tiles have no dimensions")
    pieces = -(-width // across) * -(-height // down)
    places = kept[324 if tiled else 273][1] if (324 if tiled else 273) in kept else 0
    if places > pieces * samples or pieces > _MAX_PIECES:
        raise Malformed(f"{places} strips or tiles where it has {pieces}")
    piece_bytes = -(-across * samples * bits // 8) * down
    return _plan("TIFF", (width, height), whole, piece_bytes + 2 * len(whole), pieces * across * down)


_READERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Survey]], ...] = (
    (re.compile(re.escape(_PNG)), _png),
    (re.compile(rb"\xff\xd8\xff"), _jpeg),
    (re.compile(rb"GIF8[79]a"), _gif),
    (re.compile(rb"RIFF....WEBPVP8[ XL]", re.DOTALL), _webp),
    (re.compile(rb"BM"), _bmp),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), _tiff),
)
