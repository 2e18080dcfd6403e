"""Video files: exact resampling, clear errors for bad files, faithful and atomic writing."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sfv_jax.data import video
from sfv_jax.data.images import fitted
from sfv_jax.data.video import VideoError, read_clip, write_video
from sfv_jax.data.worlds import World
from sfv_jax.runtime import platforms

NTSC = Fraction(30000, 1001)


def numbered(count: int, height: int = 48, width: int = 128) -> np.ndarray:
    """Returns frames that show their own number as eight black or white bars: uint8 `[count, height, width, 3]`."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    bars = np.repeat(255 * bits, width // 8, axis=1).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(bars[:, None, :, None], (count, height, width, 3)))


def numbers(frames: np.ndarray) -> list[int]:
    """Returns the numbers that `numbered` frames show."""
    bars = frames[:, frames.shape[1] // 2, 8::16].mean(-1) > 128
    return (bars @ (1 << np.arange(8))).tolist()


def encode(path: Path, frames: np.ndarray, rate, codec="libx264", colorspace=None, title=None, **options) -> Path:
    """Writes a file with PyAV alone, so that reading is not tested against our own writer."""
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if colorspace:
            stream.codec_context.colorspace = colorspace
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=colorspace)))
        container.mux(stream.encode())
    return path


def tone(path: Path) -> Path:
    """Writes two seconds of sound without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        wave = np.sin(np.arange(16000) / 3).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def ntsc(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("video") / "ntsc.mp4", numbered(90), NTSC, g="12", bf="2")


@pytest.mark.parametrize("start", [0.0, 0.9])
def test_frames_are_picked_by_timestamp(ntsc, start):
    expected = [int((start + k / 7) * NTSC + 1e-3) for k in range(14)]
    assert len(set(np.diff(expected))) == 2  # the stride alternates: a fixed one would be wrong
    assert numbers(read_clip(ntsc, start=start)) == expected
    assert video.duration(ntsc) == pytest.approx(90 / NTSC, abs=1e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])  # Matroska rounds times to milliseconds
def test_a_clip_of_exactly_the_right_length_is_read_whole(tmp_path, suffix):
    path = encode(tmp_path / f"exact.{suffix}", numbered(14), 7)
    assert numbers(read_clip(path)) == list(range(14))
    with pytest.raises(VideoError, match="too short: 13 of 14"):
        read_clip(path, start=1 / 7)


def test_a_slow_video_repeats_frames(tmp_path):
    path = encode(tmp_path / "slow.mp4", numbered(4), 2)
    assert numbers(read_clip(path, num_frames=8, fps=4)) == [0, 0, 1, 1, 2, 2, 3, 3]


def damaged(clean: bytes) -> dict[str, bytes]:
    flipped = bytearray(clean)
    data = clean.index(b"mdat") + 12_500  # inside a picture: a player would hide the damage
    flipped[data : data + 40] = bytes(byte ^ 0xFF for byte in flipped[data : data + 40])
    return {
        "empty": b"",
        "text": b"not a video\n" * 100,
        "truncated": clean[: len(clean) // 2],
        "flipped": bytes(flipped),
    }


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    return encode(tmp_path_factory.mktemp("video") / "noisy.mp4", frames, 7, g="12", bf="0", crf="30")


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "flipped"])
def test_damage_is_named_in_one_line(noisy, tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    path.write_bytes(damaged(noisy.read_bytes())[kind])
    assert len(read_clip(noisy, num_frames=28)) == 28
    with pytest.raises(VideoError, match="cannot read") as caught:
        read_clip(path, num_frames=28)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_without_pictures_are_refused(tmp_path):
    with pytest.raises(VideoError, match="no video stream"):
        read_clip(tone(tmp_path / "tone.mp4"))
    with pytest.raises(VideoError, match="No such file"):
        read_clip(tmp_path / "absent.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_title_in_another_encoding_is_no_damage(tmp_path, suffix):
    """Old files have titles in Latin-1; this one is not valid UTF-8."""
    path = encode(tmp_path / f"title{suffix}", numbered(7), 7, title="the tETE")
    written = path.read_bytes()
    assert written.count(b"tETE") == 1
    path.write_bytes(written.replace(b"tETE", "\u00e9t\u00e9s".encode("latin-1")))
    assert len(read_clip(path, num_frames=5)) == 5
    assert video.duration(path) > 0


COLOUR = np.array([200, 50, 100])


@pytest.mark.parametrize(("height", "tag"), [(64, 1), (64, 5), (720, None)])
def test_colours_survive_tagged_or_hd(tmp_path, height, tag):
    """BT.709 and BT.601 by tag; HD without a tag is BT.709, which is how it is encoded here."""
    frames = np.broadcast_to(COLOUR.astype(np.uint8), (3, height, 64, 3)).copy()
    path = tmp_path / "colour.mp4"
    if tag is None:
        untagged_bt709(path, frames)
    else:
        encode(path, frames, 7, colorspace=tag)
    assert np.abs(read_clip(path, num_frames=3)[0, height // 2, 32] - COLOUR).max() <= 2


def untagged_bt709(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=7)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            yuv = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", dst_colorspace=1)
            yuv.colorspace = 2
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def test_phone_videos_are_turned_upright(tmp_path):
    path = tmp_path / "phone.mp4"
    write_video(path, numbered(14))
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # the display matrix of the track header
    quarter_turn = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter_turn)
    upright = read_clip(path)
    path.write_bytes(content)
    assert np.array_equal(read_clip(path), np.rot90(upright, -1, axes=(1, 2)))


def test_mp4_round_trip(tmp_path):
    frames, _ = World(size=64, num_frames=14, radii=(8, 14)).clip(0)
    write_video(tmp_path / "new" / "clip.mp4", frames, fps=7)
    back = read_clip(tmp_path / "new" / "clip.mp4")
    error = np.square(back.astype(float) - frames).mean()
    assert 10 * np.log10(255**2 / error) > 30
    with av.open(str(tmp_path / "new" / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 7 and stream.codec_context.colorspace == 1 and stream.pix_fmt == "yuv420p"
    write_video(tmp_path / "odd.mp4", frames[:, :33, :35])
    assert read_clip(tmp_path / "odd.mp4").shape == (14, 34, 36, 3)


def test_animations_and_strips(tmp_path):
    frames, _ = World(size=64, num_frames=7, radii=(8, 14)).clip(1)
    for suffix in ("gif", "webp"):
        write_video(tmp_path / f"clip.{suffix}", frames, fps=7)
        with Image.open(tmp_path / f"clip.{suffix}") as image:
            durations = []
            for k in range(image.n_frames):
                image.seek(k)
                image.load()
                durations.append(image.info["duration"])
                assert np.abs(np.asarray(image.convert("RGB"), float) - frames[k]).mean() < 4
        assert image.n_frames == 7 and sum(durations) == 1000
    write_video(tmp_path / "clip.png", frames)
    assert np.array_equal(Image.open(tmp_path / "clip.png"), np.concatenate(frames, axis=1))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"old")

    def fail(path, *_):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setitem(video._WRITERS, ".mp4", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_video(target, numbered(3))
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_impossible_writes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use .mp4, .gif, .webp, .png"):
        write_video(tmp_path / "clip.mpeg4", numbered(3))
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "clip.mp4", numbered(3).astype(np.float32))


def test_cover_resize_crop_keeps_the_centre_and_the_aspect():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    out = fitted(ramp, 50, 50, "crop")
    assert out.shape == (50, 50, 3)
    np.testing.assert_allclose(out[25, :, 0], 50.5 + 2 * np.arange(50), atol=1)
    stack = fitted(np.stack([ramp, ramp]), 64, 96, "crop")
    assert stack.shape == (2, 64, 96, 3)
    assert fitted(ramp, 100, 200, "crop") is ramp


@pytest.mark.skipif(platforms.peak_memory() is None, reason="no account of memory")
@pytest.mark.parametrize("how", ["height=32, width=32", "each=lambda frame: frame[::64, ::64].copy()"])
def test_frames_are_shrunk_as_they_come(tmp_path, how):
    """The memory for a clip of large frames, here 6 MB each as decoded, does not grow with its length."""
    path = encode(tmp_path / "large.avi", np.zeros((40, 2048, 2048, 3), np.uint8), 25, "mpeg4")
    code = (
        "import sys\nfrom sfv_jax.data.video import read_clip\nfrom sfv_jax.runtime.platforms import peak_memory\n"
        f"clip = read_clip({str(path)!r}, int(sys.argv[1]), 25.0, {how})\nprint(clip.shape[1:], peak_memory())"
    )
    peaks = []
    for count in ("4", "40"):
        done = subprocess.run([sys.executable, "-c", code, count], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("(32, 32, 3) ")
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 100e6, peaks
