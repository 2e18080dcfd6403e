"""Reader of still images, for all commands (Pillow). Images are uint8 RGB, channels last."""

import logging
import os
import warnings
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

from sfv_jax.choices import FITS
from sfv_jax.errors import UserError
from sfv_jax.runtime.files import one_line

_UPRIGHT: dict[Any, Image.Transpose] = {  # turn for each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GRAY = ("1", "L", "LA", "La")
_COLORED = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr")
_PROFILED = {  # color space of a profile: its mode, and the modes of images that it may describe
    "RGB": ("RGB", (*_GRAY, *_COLORED)),
    "GRAY": ("L", _GRAY),
    "CMYK": ("CMYK", ("CMYK",)),
}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")  # Pillow's names of those in docs/sampling.md


class ImageError(UserError):
    """Unusable image; the message is one line with the file and the cause."""


def read_image(path: str | os.PathLike, most_pixels: int | None = None) -> np.ndarray:
    """Reads a still image as a viewer shows it: upright, in sRGB, transparency over white.

    The first picture of an animation or of several pages is read. Sixteen bits per channel become eight. Of the
    metadata only the orientation and the color profile matter, and damage in them is no error: the picture is taken as
    stored, and an unusable profile is ignored with a warning (`logging`) of one line.

    Args:
      path: the file.
      most_pixels: refuse a larger image by its header, before it is decoded, and files of no kind that docs/sampling.md
        lists: for files from strangers. None for Pillow's limits.

    Returns:
      uint8 `[h, w, 3]` RGB.
    Raises:
      ImageError: if the file is not an image, is damaged or too large, or has pixels without a defined white.
    """
    path = Path(path)
    if not os.path.isfile(path):  # a pipe would wait for its writer
        kind = "a folder, not an image" if os.path.isdir(path) else "not a regular file"
        raise ImageError(f"{one_line(path)}: {kind if os.path.exists(path) else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged metadata and of sizes below its limit
            with _open(path, known_only=most_pixels is not None) as image:
                _check_pixels(image, most_pixels)
                image.load()
                return np.asarray(_over_white(_upright(_eight_bits(image), image), path))
    except ImageError as error:
        raise ImageError(f"{one_line(path)}: {error}") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, above which it does not tell the size
        most = min(most for most in (most_pixels, 2 * (Image.MAX_IMAGE_PIXELS or 0)) if most)
        limit = f"{most / 1e6:.3g} megapixels, the limit here"
        raise ImageError(f"{one_line(path)}: more than {limit}: make it smaller") from error
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise ImageError(f"{one_line(path)}: cannot read the image: {_reason(error)}") from error


def readable(path: Path) -> bool:
    """Returns whether the beginning of a file is that of an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _open(path).close()
    except Exception:  # of every kind, as in `read_image`, which tells the reason
        return False
    return True


def fitted(frames: np.ndarray, height: int, width: int, fit: str) -> np.ndarray:
    """Brings frames to a size by Lanczos, antialiased when shrinking. The one rule of all commands.

    Args:
      frames: uint8 `[..., h, w, 3]`.
      height, width: size of the result in pixels.
      fit: what is done if the result has another shape: "crop" fills it at the frames' aspect ratio and cuts what
        sticks out, half on either side; "pad" shows the whole frame between black bars; "stretch" changes the aspect
        ratio, as diffusers' StableVideoDiffusionPipeline does.
    Returns:
      uint8 `[..., height, width, 3]`.
    Raises:
      UserError: if `fit` is unknown.
    """
    if fit not in FITS:
        raise UserError(f"fit {fit!r}: choose one of {', '.join(FITS)}")
    h, w = frames.shape[-3:-1]
    if (h, w) == (height, width):
        return frames
    box, inner = (0.0, 0.0, float(w), float(h)), (height, width)
    if fit == "crop":
        scale = max(height / h, width / w)
        left, top = max(0.0, (w - width / scale) / 2), max(0.0, (h - height / scale) / 2)
        box = (left, top, w - left, h - top)
    elif fit == "pad":
        scale = min(height / h, width / w)
        inner = max(1, min(height, round(h * scale))), max(1, min(width, round(w * scale)))
    flat = frames.reshape(-1, h, w, 3)
    resized = np.stack([Image.fromarray(f).resize(inner[::-1], Image.Resampling.LANCZOS, box) for f in flat])
    rows, columns = height - inner[0], width - inner[1]
    if rows or columns:
        bars = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
        resized = np.pad(resized, bars)
    return resized.reshape(*frames.shape[:-3], height, width, 3)


def _check_pixels(image: Image.Image, most: int | None) -> None:
    width, height = image.size
    if most is not None and width * height > most:
        size = f"{width}x{height} (width x height)"
        raise ImageError(f"{size} is more than {most / 1e6:.3g} megapixels, the limit here: make it smaller")


def _open(path: Path, *, known_only: bool = False) -> Image.Image:
    """Opens an image file, only of `FORMATS` if asked for; raises ImageError for formats that need another package."""

    def opened() -> Image.Image:
        if not known_only:
            return Image.open(path)
        Image.init()
        return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])

    try:
        return opened()
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise ImageError("the file is empty") from error
        kind = _kind(head)
        if kind == "HEIC" and find_spec("pillow_heif"):
            from pillow_heif import register_heif_opener  # pyrefly: ignore[missing-import]

            register_heif_opener()
            return opened()
        if kind == "HEIC" or (kind == "AVIF" and not features.check("avif")):
            package = "pillow-heif" if kind == "HEIC" else "--upgrade pillow"
            raise ImageError(f"{kind} needs `pip install {package}`; or save the image as PNG or JPEG") from error
        raise


def _kind(head: bytes) -> str:
    """Returns "HEIC" or "AVIF" for the first bytes of such a file, else ""."""
    if head[4:8] != b"ftyp":
        return ""
    brands = head[8 : int.from_bytes(head[:4])]
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return "HEIC" if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")) else ""


def _reason(error: Exception) -> str:
    """Returns the cause in one line."""
    if isinstance(error, UnidentifiedImageError):  # its message is a path
        return "not an image of a known kind, or damaged at its beginning (a video is not read here)"
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return one_line(text)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts gray pixels of 16 bits to 8; Pillow does so for other pixels of 16 bits."""
    if image.mode.startswith("I;16"):
        pixels, clear = np.asarray(image), image.info.pop("transparency", None)
        gray = Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if clear is None:
            return gray
        return Image.merge("LA", (gray, Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8))))
    if image.mode in ("I", "F"):
        raise ImageError(f"{image.mode} pixels (32 bits) are not supported; save the image with 8 or 16 bits a channel")
    return image


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """Turns `picture` by the EXIF orientation of `image`; damaged EXIF counts as none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        turn = _UPRIGHT.get(orientation[0] if isinstance(orientation, bytes | tuple) else orientation)
    except Exception:  # of every kind, as the tags of a damaged EXIF may have any type
        return picture
    turned = picture if turn is None else picture.transpose(turn)
    turned.info = image.info
    return turned


def _over_white(image: Image.Image, path: Path) -> Image.Image:
    """Converts an image to RGB in sRGB, transparency over white."""
    alpha = None
    if image.has_transparency_data:
        gray, image = image.mode in _GRAY, image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if gray else "RGB")
    colors = _in_srgb(image, path)
    if alpha is None:
        return colors
    colors.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")


def _in_srgb(image: Image.Image, path: Path) -> Image.Image:
    """Converts opaque pixels to RGB by the color profile of the image, if it has a usable one."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode, modes = _PROFILED.get(space, ("", ()))
        if image.mode not in modes:
            raise ImageError(f"it is for {space} and the image is {image.mode}")
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image.convert(mode), source, target, outputMode="RGB")
        assert converted is not None  # it is only for conversions in place
        return converted
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        logging.getLogger(__name__).warning("%s: color profile ignored: %s", one_line(path), _reason(error))
        return image.convert("RGB")
