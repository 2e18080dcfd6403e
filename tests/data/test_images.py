"""Still images: color, orientation and depth as a viewer shows them, and one line for each file that cannot be read."""

import io
import os
import struct
import subprocess
import sys
import zlib
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from sfv_jax.data import images
from sfv_jax.data.images import ImageError, read_image

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])  # to XYZ (D50)
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def profile(space: bytes, gamma: float, colorants: np.ndarray | None = None) -> bytes:
    """Returns an ICC profile: a matrix of colorants (RGB), or a gray curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    xyz = lambda v: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(x * 65536) for x in v))  # noqa: E731
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249))}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        for n, letter in enumerate(b"rgb"):
            tags[bytes([letter]) + b"XYZ"] = xyz(colorants[:, n])
            tags[bytes([letter]) + b"TRC"] = curve
    return packed(b"mntr" + space + b"XYZ ", tags)


def packed(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Returns an ICC profile of a device, a space of colors and one of connection, with `tags`."""
    place, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    illuminant = struct.pack(">3i", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    head = struct.pack(">I4xI", place + len(body), 0x02400000) + kind + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + illuminant + bytes(48) + table + body


def of_black_ink_alone() -> bytes:
    """Returns a CMYK profile, a table to Lab, in which only black ink has a color."""
    same, whole = bytes(range(256)), struct.pack(">i", 65536)
    matrix = whole + bytes(12) + whole + bytes(12) + whole
    corners = b"".join(bytes([0 if n & 1 else 255, 128, 128]) for n in range(16))  # black varies fastest
    return packed(b"prtrCMYKLab ", {b"A2B0": b"mft1\0\0\0\0\4\3\2\0" + matrix + 4 * same + corners + 3 * same})


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Returns sRGB in [0, 255] for linear values in [0, 1]."""
    x = np.clip(linear, 0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def exif(*entries: tuple[int, int, int, bytes], data: bytes = b"") -> bytes:
    """Returns EXIF of entries (tag, type, count, value or offset in 4 bytes), big-endian, with `data` after them."""
    table = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + table + bytes(4) + data


SIX = (0x0112, 3, 1, b"\0\x06")  # shown after a quarter turn clockwise
TURNED = {
    "sound": exif(SIX),
    "negative_rational": exif(SIX, (0x011A, 5, 1, struct.pack(">I", 38)), data=struct.pack(">ii", -72, 1)),
    "zero_denominator": exif(SIX, (0x011A, 5, 1, struct.pack(">I", 38)), data=struct.pack(">ii", 72, 0)),
    "maker_is_a_number": exif((0x010F, 3, 1, b"\0\x01"), SIX),
    "date_is_a_float": exif(SIX, (0x0132, 11, 1, b"\x7f\xc0\0\0")),
    "value_beyond_the_end": exif(SIX, (0x010E, 2, 2000, b"\0\0\x7f\xff")),
    "orientation_is_long": exif((0x0112, 4, 1, struct.pack(">I", 6))),
    "orientation_is_byte": exif((0x0112, 1, 1, b"\x06")),
}
AS_STORED = {
    "orientation_is_text": exif((0x0112, 2, 2, b"x\0")),
    "orientation_is_nine": exif((0x0112, 3, 1, b"\0\x09")),
    "no_tiff_head": b"Exif\0\0nonsense",
    "cut": exif(SIX)[:18],
    "count_beyond_the_end": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
}


@pytest.mark.parametrize("name", [*TURNED, *AS_STORED])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_only_the_orientation_of_exif_matters(tmp_path, name, suffix):
    plain, path = tmp_path / f"plain.{suffix}", tmp_path / f"{name}.{suffix}"
    Image.fromarray(PICTURE).save(plain)
    Image.fromarray(PICTURE).save(path, exif=(TURNED | AS_STORED)[name])
    expected = read_image(plain)
    assert np.array_equal(read_image(path), np.rot90(expected, -1) if name in TURNED else expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_orientation(tmp_path, orientation, suffix):
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(PICTURE).save(tmp_path / f"a.{suffix}", exif=tags)
    turned = [PICTURE, PICTURE[:, ::-1], PICTURE[::-1, ::-1], PICTURE[::-1]]
    turned += [PICTURE.swapaxes(0, 1), np.rot90(PICTURE, -1), PICTURE[::-1, ::-1].swapaxes(0, 1), np.rot90(PICTURE)]
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), turned[orientation - 1])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_colors_of_a_profile_become_srgb(tmp_path, mode):
    picture = Image.fromarray(PICTURE)
    picture = {"P": picture.quantize(8), "RGB": picture, "L": picture.convert("L")}.get(mode) or picture.convert("RGBA")
    picture.save(tmp_path / "p3.png", icc_profile=profile(b"RGB ", 2.2, P3))
    stored = np.asarray(picture.convert("RGB"))
    expected = to_srgb((stored / 255) ** (563 / 256) @ (np.linalg.inv(SRGB) @ P3).T)
    found = read_image(tmp_path / "p3.png")
    assert np.abs(found - expected).max() <= 2 and (mode == "L" or np.abs(found.astype(int) - stored).max() > 20)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_with_a_gray_profile(tmp_path, mode):
    picture = Image.fromarray(PICTURE).convert("L")
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    stored = deep if mode == "I;16" else picture.convert(mode)
    stored.save(tmp_path / "gray.png", icc_profile=profile(b"GRAY", 1.8))
    expected = to_srgb((np.asarray(picture) / 255) ** (461 / 256))[..., None].repeat(3, -1)
    assert np.abs(read_image(tmp_path / "gray.png") - expected).max() <= 2


def test_inks_with_a_profile(tmp_path):
    inks = RNG.integers(0, 256, (24, 40, 4), dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "inks.tif", icc_profile=of_black_ink_alone())
    lightness = 100 * (1 - inks[..., 3] / 255.0)
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    assert np.abs(read_image(tmp_path / "inks.tif") - to_srgb(light)[..., None]).max() <= 3


def test_an_srgb_profile_changes_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(PICTURE).save(tmp_path / "a.png", icc_profile=srgb)
    assert np.array_equal(read_image(tmp_path / "a.png"), PICTURE)


@pytest.mark.parametrize(
    "broken", [b"nonsense", profile(b"RGB ", 2.2, P3)[:200], profile(b"GRAY", 1.0), profile(b"CMYK", 1.0)]
)
def test_an_unusable_profile_is_named_and_ignored(tmp_path, caplog, broken):
    Image.fromarray(PICTURE).save(tmp_path / "a\nb.png", icc_profile=broken)
    assert np.array_equal(read_image(tmp_path / "a\nb.png"), PICTURE)
    [line] = [record.getMessage() for record in caplog.records]
    assert r"a\nb.png: color profile ignored: " in line and "\n" not in line


def test_sixteen_bits_become_eight(tmp_path):
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for suffix in ("png", "tif"):
        Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
        found = read_image(tmp_path / f"deep.{suffix}")
        assert found.dtype == np.uint8 and np.abs(found[..., 0] - deep / 257).max() <= 0.5
    for bits in (np.float32(PICTURE[..., 0]), np.int32(PICTURE[..., 0])):
        Image.fromarray(bits).save(tmp_path / "float.tif")
        with pytest.raises(
            ImageError, match=r"float.tif: .* pixels \(32 bits\) are not supported; save the image with 8"
        ):
            read_image(tmp_path / "float.tif")


def png(head: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG file of chunks (kind, content) after the header `head`."""
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    packed = [struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_transparency_is_over_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    for suffix in ("png", "webp", "tif"):
        clear.save(tmp_path / f"clear.{suffix}")
        assert (read_image(tmp_path / f"clear.{suffix}") == 255).all()
    half.save(tmp_path / "half.png")
    assert (read_image(tmp_path / "half.png") == (255, 127, 127)).all()
    half.convert("LA").save(tmp_path / "gray.png")
    assert (read_image(tmp_path / "gray.png") == 255 + (76 - 255) * 128 // 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    palette.save(tmp_path / "palette.gif", transparency=1)
    for name in ("palette.png", "palette.gif"):
        assert (read_image(tmp_path / name) == 255).all()
    rows = zlib.compress(b"\0" + struct.pack(">2H", 1000, 40000))
    deep = png(struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0), (b"tRNS", struct.pack(">H", 1000)), (b"IDAT", rows))
    (tmp_path / "deep.png").write_bytes(deep)  # gray of 16 bits, one value of which is transparent
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [255, 156]


def test_other_modes_and_first_pictures(tmp_path):
    picture = Image.fromarray(PICTURE)
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(read_image(tmp_path / "cmyk.tif").astype(int) - PICTURE).max() <= 1
    picture.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png"))) == {0, 255}
    other = Image.fromarray(255 - PICTURE)
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {})):
        picture.quantize(256).convert("RGB").save(tmp_path / name, save_all=True, append_images=[other], **options)
        first = np.asarray(picture.quantize(256).convert("RGB")).astype(int)
        assert np.abs(read_image(tmp_path / name) - first).mean() < 8, name


@cache
def damaged() -> dict[str, bytes]:
    """Returns unusable files by name."""
    files = {}
    for name in ("png", "jpeg", "webp", "bmp", "tiff", "gif", "avif"):
        buffer = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, name)
        files[f"cut.{name}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
        files[f"head.{name}"] = buffer.getvalue()[:20]
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    files["bomb.png"] = png(head, (b"IDAT", zlib.compress(bytes(1000))))
    files["no_size.png"] = png(struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0), (b"IDAT", zlib.compress(b"")))
    dot = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    sound, bomb = (b"IDAT", zlib.compress(bytes(4))), zlib.compress(bytes(10_000_000))
    for name, kind, start in (
        ("text", b"zTXt", b"a\0\0"),
        ("itxt", b"iTXt", b"a\0\1\0\0\0"),
        ("icc", b"iCCP", b"a\0\0"),
    ):
        chunk = (kind, start + bomb)
        files[f"{name}_bomb_before.png"], files[f"{name}_bomb_after.png"] = (
            png(dot, chunk, sound),
            png(dot, sound, chunk),
        )
    small = (b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    files["text_bombs.png"] = png(dot, *[small] * 80, sound)
    files["checksum.png"] = files["bomb.png"].replace(b"IDAT", b"IDAU")
    return files | {
        "empty.jpg": b"",
        "text.png": b"not a picture",
        "page.jpg": b"<html>\n</html>",
        "zeros.jpg": bytes(99),
    }


@pytest.mark.parametrize("name", damaged())
def test_damage_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(damaged()[name])
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    assert ("the file is empty" in str(caught.value)) == (damaged()[name] == b"")


def test_any_exception_of_a_decoder_is_that_of_the_file(tmp_path, monkeypatch):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")

    def fail(image):
        raise ZeroDivisionError("inside\nthe decoder")

    monkeypatch.setattr(images.Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageError, match="a.png: cannot read the image: inside$"):
        read_image(tmp_path / "a.png")


def test_formats_that_need_a_package(tmp_path, monkeypatch):
    boxes = lambda brand: struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(100)  # noqa: E731
    (tmp_path / "phone.jpg").write_bytes(boxes(b"heic"))
    with pytest.raises(ImageError, match="phone.jpg: HEIC needs `pip install pillow-heif`; or save the image as PNG"):
        read_image(tmp_path / "phone.jpg")
    for brand in (b"avif", b"avis"):
        (tmp_path / "a.avif").write_bytes(boxes(brand))
        with monkeypatch.context() as patch:
            with pytest.raises(ImageError, match="a.avif: cannot read"):
                read_image(tmp_path / "a.avif")
            patch.setattr("PIL.features.check", lambda name: False)
            with pytest.raises(ImageError, match="a.avif: AVIF needs `pip install --upgrade pillow`"):
                read_image(tmp_path / "a.avif")


def test_pillow_heif_is_used_if_it_is_there(tmp_path, monkeypatch):
    """A stand-in for the package: it registers a reader."""
    (tmp_path / "phone.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100))
    read = lambda path: Image.fromarray(PICTURE)  # noqa: E731
    package = SimpleNamespace(register_heif_opener=lambda: monkeypatch.setattr(images.Image, "open", read))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(images, "find_spec", lambda name: name == "pillow_heif")
    assert np.array_equal(read_image(tmp_path / "phone.heic"), PICTURE)


def test_places_that_hold_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    code = f"from sfv_jax.data.images import read_image; read_image({str(tmp_path / 'pipe.png')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ImageError" in done.stderr and "pipe.png: not a regular file" in done.stderr
    (tmp_path / "link.png").symlink_to("nowhere")
    for name, message in (
        ("absent.png", "no such file"),
        ("link.png", "no such file"),
        (".", "a folder, not an image"),
    ):
        with pytest.raises(ImageError, match=message):
            read_image(tmp_path / name)


def test_any_name(tmp_path):
    for name in (b"bad\xff.png", b"a:b.png", b"line\nend.png", b"\x1b[31m.png", "😀.png".encode()):
        path = tmp_path / os.fsdecode(name)
        Image.fromarray(PICTURE).save(path)
        assert np.array_equal(read_image(path), PICTURE)
        path.write_bytes(b"")
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert str(caught.value).isprintable()


def test_images_of_strangers_are_bounded_by_their_header(tmp_path):
    Image.new("1", (30, 20)).save(tmp_path / "small.png")
    assert read_image(tmp_path / "small.png", most_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match=r"small.png: 30x20 \(width x height\) is more than 0.000599 megapixels"):
        read_image(tmp_path / "small.png", most_pixels=599)
    Image.new("L", (3, 2)).save(tmp_path / "a.ppm")  # a format that is read, but that docs/sampling.md does not list
    assert read_image(tmp_path / "a.ppm").shape == (2, 3, 3)
    with pytest.raises(ImageError, match="a.ppm: cannot read the image: not an image"):
        read_image(tmp_path / "a.ppm", most_pixels=600)
