"""The measures of the comparison of decoders, against independent formulas and known answers."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from tests.decoder_quality import flicker, picture, ssim


def frames(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_ssim_is_that_of_an_independent_formula():
    a = frames(0, 2, 20, 24, 3)
    b = np.clip(a.astype(int) + frames(1, *a.shape) // 4, 0, 255).astype(np.uint8)
    assert ssim(a, a) == pytest.approx(1) and ssim(a, 255 - a) < 0

    def mean(x):  # truncated at 5 pixels, as the window is; only where it lies inside
        return gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=5 / 1.5)[:, 5:-5, 5:-5]

    x, y = a.astype(float), b.astype(float)
    covariance = mean((x - 100) * (y - 100)) - (mean(x) - 100) * (mean(y) - 100)
    variances = mean((x - 100) ** 2) - (mean(x) - 100) ** 2 + mean((y - 100) ** 2) - (mean(y) - 100) ** 2
    light = (2 * mean(x) * mean(y) + 6.5025) / (mean(x) ** 2 + mean(y) ** 2 + 6.5025)
    expected = (light * (2 * covariance + 58.5225) / (variances + 58.5225)).mean()
    assert ssim(a, b) == pytest.approx(expected, rel=1e-6)


def test_flicker_is_the_error_of_motion_alone():
    clips = frames(2, 2, 5, 8, 8, 3) // 2
    assert flicker(clips, clips) == 0 == flicker(clips + np.uint8(9), clips)  # a constant error does not flicker
    jumping = clips.copy()
    jumping[:, 1::2] += 10
    assert flicker(jumping, clips) == 10


def test_the_picture_has_a_row_for_each_video_and_their_difference(tmp_path):
    clips = [("full", frames(3, 2, 3, 32, 32, 3)), ("tiny", frames(4, 2, 3, 32, 32, 3))]
    picture(clips, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as found:
        assert found.height >= 2 * 3 * 64 and found.width >= 3 * 64
