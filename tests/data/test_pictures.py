"""Frames of another shape, and pictures that compare videos."""

import numpy as np
import pytest
from PIL import Image

from sfv_jax.data.images import fitted
from sfv_jax.data.pictures import GAP, SPACE, board, enlarge, label_width, sheet
from sfv_jax.errors import UserError

PHOTO = np.random.default_rng(0).integers(1, 256, (40, 20, 3), np.uint8)  # portrait, nowhere black


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (24, 24), (40, 80), (7, 3)])
@pytest.mark.parametrize("photo", [PHOTO, np.ascontiguousarray(PHOTO.swapaxes(0, 1))], ids=["portrait", "landscape"])
def test_what_each_fit_does(photo, size):
    (h, w), (height, width) = photo.shape[:2], size
    made = {fit: fitted(photo, height, width, fit) for fit in ("crop", "pad", "stretch")}
    assert {x.shape for x in made.values()} == {(height, width, 3)} and {x.dtype.name for x in made.values()} == {
        "uint8"
    }
    image = Image.fromarray(photo)
    assert np.array_equal(made["stretch"], np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)))
    # The whole photo lies between bars; the bars are black and of one width, up to a pixel.
    inside = made["pad"].any(axis=-1)
    rows, columns = inside.any(axis=1), inside.any(axis=0)
    assert rows.sum() == min(height, max(1, round(h * min(height / h, width / w))))
    assert columns.sum() == min(width, max(1, round(w * min(height / h, width / w))))
    for bars in (rows, columns):
        assert abs(int(np.argmax(bars)) - int(np.argmax(bars[::-1]))) <= 1
    # The crop keeps the aspect ratio: it is the middle of a photo that covers the frame.
    scale = max(height / h, width / w)
    left, top = (w - width / scale) / 2, (h - height / scale) / 2
    box = (max(left, 0), max(top, 0), w - max(left, 0), h - max(top, 0))
    expected = image.resize((width, height), Image.Resampling.LANCZOS, box)
    assert np.array_equal(made["crop"], np.asarray(expected))


def test_frames_of_the_right_size_are_left_alone_and_unknown_fits_refused():
    clip = np.stack([PHOTO, PHOTO])
    assert fitted(clip, 40, 20, "pad") is clip
    assert np.array_equal(fitted(clip, 10, 10, "crop")[1], fitted(PHOTO, 10, 10, "crop"))
    with pytest.raises(UserError, match="fit 'zoom': choose one of crop, pad, stretch"):
        fitted(PHOTO, 40, 20, "zoom")


def videos(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 200, (*shape, 3), np.uint8)


def test_a_sheet_has_labels_gaps_and_every_frame():
    clips = videos(4, 3, 16, 24)  # four rows of three frames
    names = ["real", "average", "real", "average"]
    picture = sheet([*zip(names, clips, strict=True)], group=2)
    left = label_width(names)
    h, w = enlarge(clips).shape[2:4]
    for row in range(4):
        top = row * (h + GAP) + SPACE * (row // 2)
        assert (picture[top : top + h, :left] < 128).any()  # a label
        for k in range(3):
            x = left + k * (w + GAP)
            assert np.array_equal(picture[top : top + h, x : x + w], enlarge(clips[row, k]))
            assert (picture[top : top + h, x + w : x + w + GAP] == 255).all()
        assert (picture[top + h : top + h + GAP] == 255).all()
    assert (picture[2 * (h + GAP) : 2 * (h + GAP) + SPACE] == 255).all()


def test_a_board_has_labels_gaps_and_every_frame():
    columns = [("truth", videos(2, 3, 8, 8)), ("a method with a long name", videos(2, 3, 8, 8) // 2)]
    movie = board(columns)
    assert len(movie) == 3 and (movie[:, :16] < 128).any() and np.array_equal(movie[0, :16], movie[2, :16])
    wide = label_width([name for name, _ in columns])
    for c, (_, clips) in enumerate(columns):
        h, w = enlarge(clips).shape[2:4]
        start = c * (max(wide, w) + SPACE) + (max(wide, w) - w) // 2
        for row in range(2):
            top = 16 + row * (h + GAP)
            assert np.array_equal(movie[:, top : top + h, start : start + w], enlarge(clips[row]))
            assert (movie[:, top + h : top + h + GAP] == 255).all()
    assert (movie[:, 16:, max(wide, w) : max(wide, w) + SPACE] == 255).all()
