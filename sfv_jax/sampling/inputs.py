"""Checks of what a sampler is given, and the size of its images. This module does not import JAX."""

import math
from collections.abc import Sequence

import numpy as np

from sfv_jax.choices import MOST_SEED
from sfv_jax.errors import UserError


def check_side(name: str, pixels: int | None, down: int) -> None:
    """Checks that a side of a video, if given, is a multiple of the codec's downscale `down`.

    Raises:
      UserError: if it is not.
    """
    if pixels is not None and (pixels % down or pixels < down):
        near = [m for m in (pixels // down * down, pixels // down * down + down) if m > 0]
        raise UserError(f"{name} {pixels} is not a multiple of {down}; nearest: {' and '.join(map(str, near))}")


def fitting_size(image: tuple[int, int], cells: int, down: int) -> tuple[int, int]:
    """Returns `(height, width)` of a video that has about the shape of an image, in whole latent cells.

    Args:
      image: (height, width) in pixels. A smaller image is not enlarged.
      cells: the area of the video's latents is at most `cells ** 2`: 96 for SVD, the area of 576 x 1024 pixels.
      down: pixels per latent cell.
    """
    scale = min(1.0, cells * down / math.sqrt(image[0] * image[1]))
    sides = [max(math.floor(side * scale / down + 1e-6), 1) for side in image]
    least = min(sides)  # of a very long image it was raised to 1
    rows, columns = (min(n, cells**2 // least) if n > least else n for n in sides)
    return rows * down, columns * down


def checked_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Returns a seed for each of `count` images, as for `Sampler.__call__`.

    Raises:
      UserError: if their number is another, or one is not from 0 to 2^32 - 1: JAX would use its lowest 32 bits.
    """
    seeds = [seed + n for n in range(count)] if isinstance(seed, int | float | np.number) else list(seed)
    if len(seeds) != count:
        raise UserError(f"{count} images need as many seeds, got {len(seeds)}")
    for one in seeds:
        if isinstance(one, bool) or not isinstance(one, int | np.integer) or not 0 <= one <= MOST_SEED:
            raise UserError(f"seeds are whole numbers from 0 to {MOST_SEED}, got {one!r}")
    return seeds


def checked_images(images: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    """Returns images as arrays uint8 `[h, w, 3]`.

    Raises:
      UserError: if there is none, or one has another shape or dtype; names the first and the remedy.
    """
    arrays = [np.asarray(image) for image in images]
    if not arrays:
        raise UserError("no images")
    for n, image in enumerate(arrays):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            continue
        if image.dtype != np.uint8:
            remedy = "convert its pixels to 0..255, np.uint8"
        elif image.ndim == 2 and np.ndim(images) == 3 and image.shape[1] == 3:
            remedy = "put a single image into a list"
        elif image.ndim == 2 or image.shape[2:] == (1,):
            remedy = "repeat a gray channel three times"
        elif image.shape[2:] == (4,):
            remedy = "put RGBA over a background and drop its alpha"
        else:
            remedy = "channels come last, and a batch is a sequence of images"
        found = f"{image.dtype} [{', '.join(map(str, image.shape))}]"
        raise UserError(f"image {n} must be uint8 [h, w, 3], RGB, got {found}: {remedy}")
    return arrays


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes `image` to uint8 `[height, width, 3]` by Lanczos, without cropping, as StableVideoDiffusionPipeline does.

    Raises:
      UserError: if the image is not uint8 `[h, w, 3]`.
    """
    [image] = checked_images([image])
    if image.shape[:2] == size:
        return image
    from PIL import Image  # not on bare accelerator images, where the benchmark runs

    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))
