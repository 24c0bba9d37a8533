"""The door for images: every kind looks as in a browser, on every path; what would cost a decoder too much is refused
before it starts."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from benchmarks.serve import hostile_images as hostile
from quota.calib.samples import Sample, Samples
from quota.core import images
from quota.core.errors import ImageError
from quota.eval.questions import sample_questions
from tests.serve.pictures import data_url, encoded, noise

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def corners(left_top=RED, rest=BLUE) -> Image.Image:
    """8 x 4, the upper left quarter of another colour."""
    image = Image.new("RGB", (8, 4), rest)
    image.paste(left_top, (0, 0, 4, 2))
    return image


def turned(orientation: int, format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(
        corners(),
        format,
        exif=exif,
        **({"quality": 100, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}),
    )


def palette() -> bytes:
    image = Image.new("P", (8, 4), 1)
    image.putpalette([*RED, *BLUE])
    image.paste(0, (0, 0, 4, 2))
    return encoded(image, transparency=0)


def clear(mode: str) -> Image.Image:
    """Transparent (over black) in the upper left quarter, else black."""
    image = Image.new(mode, (8, 4), (0,) * (len(mode) - 1) + (255,))
    image.paste((0,) * len(mode), (0, 0, 4, 2))
    return image


def grey(values: list[float], dtype: str, format: str) -> bytes:
    return encoded(Image.fromarray(np.array([values], dtype=dtype).repeat(2, axis=0)), format)


# name: (file, {(x, y): colour})
LOOKS = {
    **{
        f"EXIF {n} {kind}": (turned(n, kind), {red: RED, blue: BLUE})
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
        for n, red, blue in (
            (1, (0, 0), (7, 0)),
            (2, (7, 0), (0, 0)),
            (3, (7, 3), (0, 0)),
            (4, (0, 3), (0, 0)),
            (5, (0, 0), (3, 0)),
            (6, (3, 0), (0, 0)),
            (7, (3, 7), (0, 0)),
            (8, (0, 7), (0, 0)),
        )
    },
    "RGBA": (encoded(clear("RGBA")), {(0, 0): WHITE, (7, 3): (0, 0, 0)}),
    "LA": (encoded(clear("LA")), {(0, 0): WHITE, (7, 3): (0, 0, 0)}),
    "RGBA webp": (encoded(clear("RGBA"), "WEBP", lossless=True), {(0, 0): WHITE, (7, 3): (0, 0, 0)}),
    "RGBA tiff": (encoded(clear("RGBA"), "TIFF"), {(0, 0): WHITE, (7, 3): (0, 0, 0)}),
    "half": (encoded(Image.new("RGBA", (8, 4), (0, 0, 0, 128))), {(0, 0): (127, 127, 127)}),
    "palette": (palette(), {(0, 0): WHITE, (7, 3): BLUE}),
    "gif": (encoded(Image.new("P", (8, 4), 0), "GIF", transparency=0), {(0, 0): WHITE}),
    "RGB key": (encoded(corners(), transparency=RED), {(0, 0): WHITE, (7, 3): BLUE}),
    "grey key": (encoded(Image.new("L", (8, 4), 7), transparency=7), {(0, 0): WHITE}),
    "grey key of 4 bits": (
        hostile.png((8, 4), (b"tRNS", struct.pack(">H", 15)), depth=4, pixels=(b"\0\xf0\0\0\0") * 4),
        {(0, 0): WHITE, (1, 0): (0, 0, 0)},
    ),
    "RGB key of 16 bits": (
        hostile.png(
            (2, 1),
            (b"tRNS", struct.pack(">3H", 0x1234, 0, 0)),
            depth=16,
            colours=2,
            pixels=b"\0" + struct.pack(">6H", 0x1234, 0, 0, 0x4444, 0, 0),
        ),
        {(0, 0): WHITE, (1, 0): (0x44, 0, 0)},
    ),
    "grey key of 16 bits": (
        hostile.png((2, 1), (b"tRNS", struct.pack(">H", 5)), depth=16, pixels=b"\0" + struct.pack(">2H", 5, 6)),
        {(0, 0): WHITE, (1, 0): (0, 0, 0)},
    ),
    "grey 16": (
        grey([0, 257, 25700, 65535], "uint16", "PNG"),
        {(0, 0): (0,) * 3, (1, 0): (1,) * 3, (2, 0): (100,) * 3, (3, 0): WHITE},
    ),
    "dark grey 16": (grey([0, 100, 128, 200], "uint16", "PNG"), {(1, 0): (0,) * 3, (3, 0): (1,) * 3}),
    "grey 16 tiff": (grey([0, 25700], "uint16", "TIFF"), {(0, 0): (0,) * 3, (1, 0): (100,) * 3}),
    "float of 1": (grey([0, 0.5, 1], "float32", "TIFF"), {(0, 0): (0,) * 3, (1, 0): (128,) * 3, (2, 0): WHITE}),
    "float of 255": (grey([0, 100, 254.6], "float32", "TIFF"), {(1, 0): (100,) * 3, (2, 0): WHITE}),
    "float of 65535": (grey([0, 25700, 300], "float32", "TIFF"), {(1, 0): (100,) * 3, (2, 0): (1,) * 3}),
    "float of its own": (grey([-1, 0, 1], "float32", "TIFF"), {(0, 0): (0,) * 3, (1, 0): (128,) * 3, (2, 0): WHITE}),
    "float not a number": (
        grey([float("nan"), 0, 1, float("inf")], "float32", "TIFF"),
        {(0, 0): (0,) * 3, (3, 0): WHITE},
    ),
    "integers": (grey([0, 100, 255], "int32", "TIFF"), {(1, 0): (100,) * 3, (2, 0): WHITE}),
}


def through_cli(data: bytes, folder) -> Image.Image:
    (folder / "image").write_bytes(data)
    return images.open_file(folder / "image", name="--image")


def through_samples(data: bytes, folder) -> Image.Image:
    (folder / "image").write_bytes(data)
    (folder / "samples.json").write_text(
        '{"schema": "quota-samples/1", "samples": [{"id": "a", "image": "image", "instruction": "x", "answer": "y"}]}'
    )
    image = Samples.load(folder / "samples.json")[0].image()
    assert sample_questions(Samples.load(folder / "samples.json"))[0].open_image().tobytes() == image.tobytes()
    return image


def through_data_url(data: bytes, folder) -> Image.Image:
    return Sample("a", "x", images.read_data_url(data_url(data))).image()


def through_pillow(data: bytes, folder) -> Image.Image:
    """As lmms-eval hands pictures over."""
    return images.to_rgb(Image.open(io.BytesIO(data)))


DOORS = (through_cli, through_samples, through_data_url, through_pillow)


# Pillow compares keys of 4 and 16 bits in another depth; only what comes as a file is put right
@pytest.mark.parametrize(
    ("kind", "door"),
    [(kind, door) for kind in LOOKS for door in DOORS if not (door is through_pillow and "key of" in kind)],
)
def test_an_image_looks_as_in_a_browser_on_every_path(kind, door, tmp_path):
    data, colours = LOOKS[kind]
    image = door(data, tmp_path)
    assert image.mode == "RGB"
    for place, colour in colours.items():
        assert max(abs(a - b) for a, b in zip(image.getpixel(place), colour, strict=True)) <= 2, place


@pytest.mark.parametrize(
    "data",
    [
        encoded(noise()),
        encoded(noise(), "JPEG"),
        encoded(noise(), "JPEG", progressive=True),
        encoded(noise(), "WEBP"),
        encoded(noise(), "BMP"),
        encoded(noise(), "GIF"),
        encoded(noise().convert("L")),
        encoded(noise().convert("CMYK"), "JPEG"),
        *(encoded(noise(), "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        encoded(noise().convert("1"), "TIFF", compression="group4"),
    ],
)
def test_ordinary_images_keep_their_pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        assert images.decode(data).tobytes() == image.convert("RGB").tobytes()


def test_opaque_alpha_changes_nothing():
    image = noise()
    image.putalpha(255)
    assert images.decode(encoded(image)).tobytes() == noise().tobytes()


# each at a tenth of its size or less, against limits a tenth as high
SMALL = images.Limits(pixels=400_000, decode_bytes=10_000_000)
ATTACKS = {
    "scans": hostile.many_scans(600, 100),
    "exif segments": hostile.many_exif_segments(20_000),
    "empty segments": hostile.many_comments(20_000),
    "short png": hostile.short_png(6000),
    "huge tile": hostile.huge_tile(1600),
    "strips": hostile.repeated_strips(400, 10_000),
    "gif frame": hostile.large_gif_frame(1300),
    "gif blocks": hostile.many_gif_blocks(500_000),
    "webp canvas": hostile.large_webp_canvas(1600),
    "run lengths": hostile.run_length_bmp(2100),
    "many chunks": hostile.png((4, 4), *[(b"IDAT", b"")] * 300_000),
    "one tile per pixel": hostile.tiff((600, 600), {322: (4, [1]), 323: (4, [1]), 324: (4, [8])}, b""),
    "tiles and strips": hostile.tiff((8, 8), {322: (4, [16]), 323: (4, [16]), 273: (4, [8])}, b""),
    "a width twice": hostile.tiff((8, 8), {}, b"").replace(struct.pack("<HH", 258, 3), struct.pack("<HH", 256, 3)),
    "lzma tiff": hostile.tiff((8, 8), {259: (3, [34925]), 273: (4, [8])}, b""),
    "samples": hostile.tiff((8, 8), {277: (3, [60_000]), 273: (4, [8])}, b""),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_what_would_cost_too_much_is_refused_before_it_is_decoded(kind, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a decoder was started")

    monkeypatch.setattr(Image, "open", never)
    limits = images.Limits() if kind == "run lengths" else SMALL
    with pytest.raises(ImageError):
        images.decode(ATTACKS[kind], limits)


@pytest.mark.parametrize("data", [hostile.text_bomb(6), hostile.profile_bomb(150)])
def test_what_does_not_decide_pixels_is_not_unpacked(data, monkeypatch):
    monkeypatch.setattr("PIL.PngImagePlugin._safe_zlib_decompress", lambda data: pytest.fail("unpacked"))
    assert images.decode(data).size == (16, 16)


def test_later_frames_and_nested_directories_are_not_read():
    body = zlib.compress(bytes(64))
    strips = {273: (4, [8]), 279: (4, [len(body)])}
    for data in (
        hostile.tiff((8, 8), strips, body, more=8),
        hostile.tiff((8, 8), {**strips, 330: (4, [8]), 34665: (4, [8]), 34853: (4, [8])}, body),
    ):
        assert images.decode(data).size == (8, 8)
        with Image.open(io.BytesIO(images.inspect(data).data)) as left:
            assert left.n_frames == 1 and not {330, 34665, 34853} & set(left.tag_v2)


@pytest.mark.parametrize("size", [(1, 5000), (1500, 5), (3000, 2)])
@pytest.mark.parametrize("door", DOORS[:3])
def test_strips_are_refused_on_every_path(door, size, tmp_path):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]}; one side may be at most 50 times the other"):
        door(encoded(noise(*size)), tmp_path)


@pytest.mark.parametrize("door", DOORS[:2])
def test_only_regular_files_are_read(door, tmp_path):
    for name in ("/dev/zero", tmp_path / "fifo", tmp_path):
        if name == tmp_path / "fifo":
            os.mkfifo(name)
        (tmp_path / "samples.json").write_text(
            f'{{"schema": "quota-samples/1", "samples": [{{"id": "a", "image": "{name}", "instruction": "x"}}]}}'
        )
        with pytest.raises(ImageError, match=r"not a regular file|Is a directory") as caught:
            images.open_file(name) if door is through_cli else Samples.load(tmp_path / "samples.json")
        assert str(name) in str(caught.value) and "\n" not in str(caught.value)


def test_reads_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1001))
    for read in (
        lambda limits: images.read_file(tmp_path / "a", limits),
        lambda limits: images.read_data_url(data_url(bytes(1001)), limits),
    ):
        with pytest.raises(ImageError, match="more than 1000 bytes") as caught:
            read(images.Limits(encoded_bytes=1000))
        assert caught.value.too_large
        assert len(read(images.Limits(encoded_bytes=1001))) == 1001


def test_the_door_is_cheap_to_import():
    code = (
        "import sys, quota.core.images; print([m for m in ('PIL', 'numpy', 'torch', 'pydantic') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_truncated_images_are_refused():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for format in images.FORMATS:
        data = encoded(noise(), format)
        with pytest.raises(ImageError, match="not a readable image"):
            images.decode(data[: len(data) // 2])
