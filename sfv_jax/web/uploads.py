"""Images from strangers: bounded before they are decoded, and a preview. This module does not import JAX."""

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from sfv_jax.data.images import ImageError, read_image
from sfv_jax.runtime.files import one_line
from sfv_jax.web.request import Limits, RequestError
from sfv_jax.web.sessions import Session

PREVIEW = 640  # pixels of the longer side
LOSSLESS = 2**17  # pixels of a picture up to which a page gets it without loss


def too_many_bytes(limits: Limits) -> RequestError:
    """Returns the error for an upload above the limit."""
    return RequestError(f"The file is larger than {_megabytes(limits.upload_bytes)}, the limit here.")


def receive(session: Session, name: str, content: bytes, limits: Limits) -> tuple[int, int, str]:
    """Makes an uploaded file the image of a session, if it is one.

    Args:
      session: the session.
      name: name of the file at its owner's; only used for names of files to download.
      content: the file.
      limits: limits of bytes and pixels.

    Returns:
      height, width: of the image, in pixels.
      preview: a `data:` URL of it, made smaller.

    Raises:
      RequestError: if the file is too large or no image that can be read; the former image stays.
    """
    if not content:
        raise RequestError("The file is empty.")
    if len(content) > limits.upload_bytes:
        raise too_many_bytes(limits)
    with session.open() as folder:
        session.made += 1
        path = folder / f"upload-{session.made}-{plain_name(name)}"
        path.write_bytes(content)
        try:
            pixels = read_upload(path, name, limits)
        except RequestError:
            path.unlink(missing_ok=True)
            raise
        session.replace_image(path)
    picture = Image.fromarray(pixels)
    picture.thumbnail((PREVIEW, PREVIEW))
    return pixels.shape[0], pixels.shape[1], data_url(np.asarray(picture))


def read_upload(path: Path, name: str, limits: Limits) -> np.ndarray:
    """Reads an uploaded image, uint8 `[h, w, 3]`.

    Args:
      path: the file.
      name: its name, for the message.
      limits: limits of pixels.

    Raises:
      RequestError: if it cannot be read or has too many pixels.
    """
    try:
        return read_image(path, limits.upload_pixels)
    except ImageError as error:
        cause = str(error).removeprefix(f"{one_line(path)}: ")
        raise RequestError(f"{one_line(name)[:80]}: {cause}.") from error


def plain_name(name: str) -> str:
    """Returns the last part of a name without anything that a file system or a header could take for something else."""
    stem, dot, suffix = re.split(r"[/\\]", name)[-1].rpartition(".")
    stem, suffix = (stem, suffix) if dot else (suffix, "")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or "image"
    suffix = re.sub(r"[^A-Za-z0-9]+", "", suffix)[:5]
    return f"{stem}.{suffix}" if suffix else stem


def data_url(frame: np.ndarray) -> str:
    """Returns a picture uint8 `[h, w, 3]` as a `data:` URL: PNG if it is small, else JPEG."""
    kind, content = picture(frame)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(frame: np.ndarray) -> tuple[str, bytes]:
    """Returns the kind ("png" if it is small, else "jpeg") and the bytes of a picture of uint8 `[h, w, 3]`."""
    kind = "png" if frame.shape[0] * frame.shape[1] <= LOSSLESS else "jpeg"
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind, **({"quality": 92} if kind == "jpeg" else {}))
    return kind, buffer.getvalue()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count:,} bytes"
