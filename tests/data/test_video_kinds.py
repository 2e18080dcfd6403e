"""Sound but unusual videos are read right, whatever kind they are; unreadable ones are named and skipped."""

import io
import os
import socket
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from sfv_jax.data import video
from sfv_jax.data.video import VideoError, read_clip, write_video
from tests.data.test_video import encode, numbered

CASES = Path(__file__).parent / "cases"
COLOR = (200, 50, 100)


def at_7_fps(rate: int, start: float = 0.0, skipped: int = 0) -> list[int]:
    """Returns the numbers of the frames on screen in a clip of 14 frames at 7 fps from `start`."""
    return [skipped + int((start + k / 7) * rate + 1e-3) for k in range(14)]


def numbers(frames: np.ndarray) -> list[int]:
    """Returns the numbers that frames of any size show as eight bars."""
    width = frames.shape[2]
    rows = frames[:, frames.shape[1] // 2 - 4 : frames.shape[1] // 2 + 4].mean((1, 3))
    return ((rows[:, width // 16 :: width // 8] > 128) @ (1 << np.arange(8))).tolist()


# ---- timestamps ----


def test_packed_b_frames_of_xvid():
    """A file as UCF-101 has them: two pictures in one packet, then an empty one."""
    path = CASES / "xvid_packed_b.avi"
    assert numbers(read_clip(path)) == at_7_fps(25)
    assert numbers(read_clip(path, fps=25)) == list(range(14))
    assert numbers(read_clip(path, start=2)) == at_7_fps(25, 2)


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", "avi"), ("mpeg4", "avi"), ("mpeg4", "mp4"), ("mpeg4", "mkv")]
)
@pytest.mark.parametrize("start", [0, 1.3])
def test_b_frames_of_containers_with_and_without_presentation_times(tmp_path, codec, suffix, start):
    path = encode(tmp_path / f"b.{suffix}", numbered(120), 30, codec, g="15", bf="2")
    assert numbers(read_clip(path, start=start)) == at_7_fps(30, start)
    assert numbers(read_clip(path, 120, fps=30)) == list(range(120))


def test_empty_pictures_repeat_the_one_before(tmp_path):
    """MPEG-4 that drops frames stores pictures without content (a header with vop_coded = 0) in their place."""
    empty = b"\0\0\1\xb6" + int("0101000001001111", 2).to_bytes(2, "big")
    sound, path = encode(tmp_path / "sound.avi", numbered(60), 30, "mpeg4", g="12", bf="2"), tmp_path / "clip.avi"
    slots: list[bool] = []  # whether each has a picture of its own
    with av.open(str(sound)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for n, packet in enumerate(p for p in source.demux(video=0) if p.size):
            for data in (bytes(packet), empty)[: 1 + (n % 6 == 3)]:
                copy = av.Packet(data)
                copy.stream, copy.time_base, copy.pts, copy.dts = stream, Fraction(1, 30), len(slots), len(slots)
                target.mux(copy)
                slots.append(data is not empty)
    assert numbers(read_clip(path, 60, fps=30)) == (np.cumsum(slots)[:60] - 1).tolist()


def test_decoding_times_in_place_of_presentation_times(tmp_path):
    """Some writers store the times of decoding as those of presentation; the order of frames tells."""
    sound = encode(tmp_path / "sound.mkv", numbered(90), 30, bf="2", g="15")
    path = tmp_path / "wrong.mkv"
    with av.open(str(sound)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for n, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.stream, packet.pts, packet.dts = stream, round(n * 1000 / 30), round(n * 1000 / 30)
            target.mux(packet)
    assert numbers(read_clip(path)) == at_7_fps(30)


@pytest.mark.parametrize(("codec", "kind"), [("mpeg2video", "mpeg"), ("mpeg2video", "mpegts"), ("libx264", "mpegts")])
@pytest.mark.parametrize("start", [1, 2.5])
def test_inexact_seeks(tmp_path, codec, kind, start):
    path = encode_as(tmp_path / "clip.mpg", kind, numbered(150), 25, codec, g="12", bf="2")
    assert numbers(read_clip(path, start=start)) == at_7_fps(25, start)
    assert video.duration(path) == pytest.approx(6, abs=0.05)


def encode_as(path: Path, kind: str, *args, **options) -> Path:
    """Writes a file like `encode`, in a container that its name does not tell."""
    with_suffix = path.with_suffix({"mpeg": ".mpg", "mpegts": ".ts"}[kind])
    encode(with_suffix, *args, **options).rename(path)
    return path


def test_the_length_is_that_of_the_pictures(tmp_path):
    path = tmp_path / "long_audio.mkv"
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=30)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 128, "yuv420p"
        sound = container.add_stream("aac", rate=8000, layout="mono")
        for frame in numbered(60):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(pictures.encode())
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 40000), np.float32), format="fltp", layout="mono")
        wave.sample_rate = 8000
        container.mux(sound.encode(wave))
        container.mux(sound.encode())
    assert video.duration(path) == pytest.approx(2, abs=0.05)


class Pipe(io.RawIOBase):
    """File that cannot be rewound, as the end of a shell pipe."""

    def __init__(self):
        self.content = b""

    def write(self, data):
        self.content += bytes(data)
        return len(data)

    def writable(self):
        return True


@pytest.mark.parametrize("kind", ["webm", "matroska"])
def test_a_piped_file_has_no_length_in_its_header(tmp_path, kind):
    pipe, path = Pipe(), tmp_path / "piped.mkv"
    with av.open(pipe, "w", format=kind) as container:
        stream = container.add_stream("libvpx", rate=30, options={"deadline": "realtime"})
        stream.height, stream.width, stream.pix_fmt = 48, 128, "yuv420p"
        for frame in numbered(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(pipe.content)
    assert video.duration(path) == pytest.approx(2, abs=0.05)
    assert numbers(read_clip(path, num_frames=4, start=1)) == at_7_fps(30, 1)[:4]


# ---- damage and what only looks like it ----

OPEN_GOP = {"x264-params": "open-gop=1:keyint=25:min-keyint=25:scenecut=0:bframes=3:b-adapt=0:b-pyramid=normal"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=25:scenecut=0:bframes=0"}


@pytest.mark.parametrize("options", [OPEN_GOP, REFRESH], ids=["open", "refresh"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_pictures_that_refer_to_what_was_before_the_seek(tmp_path, suffix, options):
    path = encode(tmp_path / f"clip.{suffix}", textured(150), 25, **options)
    for start in (0, 2, 3.3):
        assert numbers(read_clip(path, start=start)) == at_7_fps(25, start)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_lossless_cut_begins_with_its_first_whole_picture(tmp_path, suffix):
    path = encode(tmp_path / f"clip.{suffix}", textured(150), 25, **OPEN_GOP)
    cut = tmp_path / f"cut.{suffix}"
    with av.open(str(path)) as source, av.open(str(cut), "w") as target:
        stream, begin = source.streams.video[0], None
        copy, tick = target.add_stream_from_template(stream), stream.time_base
        source.seek(round(2 / tick), stream=stream)
        for n, packet in enumerate(p for p in source.demux(stream) if p.size):
            begin = packet.pts if begin is None else begin
            packet.stream, packet.pts, packet.dts = copy, packet.pts - begin, round((n - 2) / 25 / tick)
            target.mux(packet)
    first = numbers(read_clip(cut))[0]
    assert first in (49, 50, 51, 52)
    assert numbers(read_clip(cut)) == at_7_fps(25, 0, skipped=first)


def test_a_recording_that_begins_amid_a_group(tmp_path):
    path = encode(tmp_path / "clip.ts", textured(150), 25, g="25", bf="2", **{"sc_threshold": "0"})
    content = path.read_bytes()
    path.write_bytes(content[: 2 * 188] + content[len(content) // 3 // 188 * 188 :])
    shown = numbers(read_clip(path))
    assert shown[0] % 25 == 0 and shown == at_7_fps(25, 0, skipped=shown[0])


def test_a_message_beside_the_pictures_may_be_broken(tmp_path):
    path = encode(tmp_path / "clip.mp4", numbered(60), 30, bf="0")
    content = bytearray(path.read_bytes())
    size = content.index(b"\x06\x05\xff") + 2  # of the encoder's signature
    while content[size] == 255:
        size += 1
    content[size] += 30
    path.write_bytes(content)
    assert numbers(read_clip(path, num_frames=13)) == at_7_fps(30)[:13]


def textured(count: int) -> np.ndarray:
    """Returns `numbered` frames with noise, so that every picture takes up some bytes."""
    noise = np.random.default_rng(0).integers(0, 40, (count, 48, 128, 1))
    return (numbered(count) * 0.7 + noise).astype(np.uint8)


FLIPPED = {
    "h264.mp4": ("libx264", {"g": "12", "bf": "2", "preset": "ultrafast"}),
    "h264.ts": ("libx264", {"g": "12", "preset": "ultrafast"}),
    "h264.avi": ("libx264", {"g": "12", "bf": "2", "preset": "ultrafast"}),
    "mpeg4.avi": ("mpeg4", {"g": "12", "bf": "2", "b": "1M"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2", "b": "1M"}),
    "ffv1.mkv": ("ffv1", {}),
}


@pytest.mark.parametrize("name", FLIPPED)
def test_flipped_bytes_are_still_found(tmp_path, name):
    codec, options = FLIPPED[name]
    path = encode(tmp_path / name, textured(60), 25, codec, **options)
    assert len(read_clip(path, num_frames=28, fps=14)) == 28
    content = bytearray(path.read_bytes())
    for at in (len(content) * 2 // 5, len(content) * 3 // 5):
        content[at : at + 40] = bytes(byte ^ 0xFF for byte in content[at : at + 40])
    path.write_bytes(content)
    with pytest.raises(VideoError, match="cannot read"):
        read_clip(path, num_frames=28, fps=14)


# ---- pictures ----


@pytest.mark.parametrize(("codec", "suffix"), [("libvpx", "webm"), ("libx264", "ts")])
def test_a_size_that_changes_amid_the_video(tmp_path, codec, suffix):
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=7)
        stream.height, stream.width, stream.pix_fmt = 48, 128, "yuv420p"
        for part, size in enumerate(((48, 128), (96, 256))):
            context = av.CodecContext.create(codec, "w")
            context.height, context.width, context.pix_fmt = *size, "yuv420p"
            context.time_base, context.framerate, context.options = Fraction(1, 7), Fraction(7), {"bf": "0"}
            pictures = [av.VideoFrame.from_ndarray(x, format="rgb24") for x in numbered(7, *size)]
            for n, picture in enumerate(pictures):
                picture.pts, picture.time_base = 7 * part + n, Fraction(1, 7)
            for packet in [p for x in (*pictures, None) for p in context.encode(x)]:
                packet.stream = stream
                container.mux(packet)
    assert read_clip(path, height=32, width=64).shape == (14, 32, 64, 3)
    clip = read_clip(path)
    assert clip.shape == (14, 48, 128, 3) and numbers(clip) == [*range(7), *range(7)]


def quarters() -> np.ndarray:
    """Returns 7 frames whose quarters have different gray levels: uint8 `[7, 48, 128, 3]`."""
    quarters = np.kron(np.array([[40, 100], [160, 220]], np.uint8), np.ones((24, 64), np.uint8))
    return np.ascontiguousarray(np.broadcast_to(quarters[..., None], (7, 48, 128, 3)))


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Writes an mp4 file with a display matrix in the header of its track."""
    write_video(path, quarters())
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    values = [round(x * 2**16) for x in (a, b, 0, c, d, 0, 0, 0, 2**14)]
    content[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        ((-1, 0, 0, 1), [[100, 40], [220, 160]]),
        ((1, 0, 0, -1), [[160, 220], [40, 100]]),
        ((-1, 0, 0, -1), [[220, 160], [100, 40]]),
        ((0, 1, 1, 0), [[40, 160], [100, 220]]),
        ((0, -1, -1, 0), [[220, 100], [160, 40]]),
        ((0, 1, -1, 0), [[160, 40], [220, 100]]),
        ((0, -1, 1, 0), [[100, 220], [40, 160]]),
    ],
)
def test_turned_and_mirrored_pictures_are_upright(tmp_path, matrix, corners):
    clip = read_clip(with_matrix(tmp_path / "clip.mp4", *matrix), num_frames=3)
    assert np.abs(clip[0, 8::30, 8::30, 0][[0, -1]][:, [0, -1]].astype(int) - corners).max() <= 3


def test_other_angles_are_refused(tmp_path):
    with pytest.raises(VideoError, match="turns the picture by 30 degrees: only multiples of 90"):
        read_clip(with_matrix(tmp_path / "clip.mp4", 0.866, 0.5, -0.5, 0.866), num_frames=3)


def test_the_default_stream_is_read(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for height, width in ((48, 128), (96, 256)):
            stream = container.add_stream("libx264", rate=7)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            streams.append(stream)
        streams[0].disposition, streams[1].disposition = Disposition(0), Disposition.default
        for stream in streams:
            for frame in numbered(14, stream.height, stream.width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    assert read_clip(path).shape == (14, 96, 256, 3)


def tagged(path: Path, planes: np.ndarray, pix_fmt: str, codec: str = "libx264", **tags) -> Path:
    """Writes 7 frames that are `planes`, the content of an `av.VideoFrame` in `pix_fmt`, with color tags."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=7, options={"crf": "1", "x265-params": "log-level=none"})
        frame = av.VideoFrame.from_ndarray(planes, format=pix_fmt)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        for n in range(7):
            frame.pts, frame.time_base = n, Fraction(1, 7)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_hlg_of_a_common_converter():
    """The patch was (200, 50, 100) before its conversion to HDR; ffmpeg's zscale and tonemap return (203, 59, 106)."""
    patch = read_clip(CASES / "hdr_hlg.mp4", num_frames=3)[0, 4:20, 4:20].reshape(-1, 3)
    assert np.abs(np.median(patch, axis=0) - (203, 59, 106)).max() <= 4


@pytest.mark.parametrize(("nits", "gray"), [(100, 202), (10, 74), (1000, 246)])
def test_pq_is_mapped_to_sdr(tmp_path, nits, gray):
    """Grays of known light: SDR white is 100 cd/m2; 202 is what the Mobius curve leaves of it."""
    power = (nits / 10_000) ** (2610 / 16384)
    coded = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    planes = np.full((72, 64), 512, np.uint16)
    planes[:48] = round(64 + 876 * coded)
    tags = dict(colorspace=9, color_trc=16, color_primaries=9, color_range=1)
    path = tagged(tmp_path / "pq.mp4", planes, "yuv420p10le", "libx265", **tags)
    assert np.abs(read_clip(path, num_frames=3)[0, 24, 32].astype(int) - gray).max() <= 3


def test_bt2020_gamut_is_converted(tmp_path):
    """A red that is half as bright as that of BT.709, coded with the primaries of BT.2020."""
    light = (
        np.linalg.inv([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])[:, 0] / 2
    )
    r, g, b = 1.099 * light**0.45 - 0.099
    luma = 0.2627 * r + 0.678 * g + 0.0593 * b
    planes = np.empty((72, 64), np.uint16)
    planes[:48] = round(64 + 876 * luma)
    planes[48:60] = round(512 + 896 * (b - luma) / 1.8814)
    planes[60:] = round(512 + 896 * (r - luma) / 1.4746)
    tags = dict(colorspace=9, color_trc=14, color_primaries=9, color_range=1)
    path = tagged(tmp_path / "wide.mp4", planes, "yuv420p10le", "libx265", **tags)
    expected = 255 * (1.099 * 0.5**0.45 - 0.099)
    assert np.abs(read_clip(path, num_frames=3)[0, 24, 32].astype(int) - (expected, 0, 0)).max() <= 4


@pytest.mark.parametrize("full", [True, False])
def test_ycgco_is_converted(tmp_path, full):
    r, g, b = COLOR
    luma, green, orange = (r + 2 * g + b) / 4, (2 * g - r - b) / 4, (r - b) / 2
    values = (
        (luma, 128 + green, 128 + orange)
        if full
        else (
            16 + luma * 219 / 255,
            128 + green * 224 / 255,
            128 + orange * 224 / 255,
        )
    )
    planes = np.ones((3, 48, 64), np.uint8) * np.round(values).astype(np.uint8)[:, None, None]
    tags = dict(colorspace=8, color_range=2 if full else 1)
    path = tagged(tmp_path / "ycgco.mp4", planes, "yuv444p", **tags)
    assert np.abs(read_clip(path, num_frames=3)[0, 24, 32].astype(int) - COLOR).max() <= 3


def test_a_matrix_that_nothing_here_converts_is_named(tmp_path):
    path = tagged(tmp_path / "ictcp.mp4", np.full((72, 64), 128, np.uint8), "yuv420p", colorspace=14)
    with pytest.raises(VideoError, match="color matrix ICtCp is not supported; convert the file") as caught:
        read_clip(path, num_frames=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("height", "width"), [(544, 1280), (608, 64)])
def test_untagged_high_definition_of_any_shape_is_bt709(tmp_path, height, width):
    planes = np.empty((height * 3 // 2, width), np.uint8)
    r, g, b = (value / 255 for value in COLOR)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    planes[:height] = round(16 + 219 * luma)
    planes[height : height * 5 // 4] = round(128 + 224 * (b - luma) / 1.8556)
    planes[height * 5 // 4 :] = round(128 + 224 * (r - luma) / 1.5748)
    path = tagged(tmp_path / "hd.mp4", planes, "yuv420p")
    assert np.abs(read_clip(path, num_frames=2)[0, height // 2, width // 2].astype(int) - COLOR).max() <= 3


def test_interlaced_pictures_are_made_whole(tmp_path):
    """A bar that moves 4 pixels between the fields of a frame leaves combs in it."""
    fields = np.zeros((40, 48, 128), np.uint8)
    for n, field in enumerate(fields):
        field[:, 10 + 2 * n : 30 + 2 * n] = 255
    woven = fields[::2].copy()
    woven[:, 1::2] = fields[1::2, 1::2]
    frames = np.ascontiguousarray(np.broadcast_to(woven[..., None], (*woven.shape, 3)))
    flags = {"flags": "+ildct+ilme", "top": "1", "b": "4M"}
    path = tmp_path / "interlaced.mpg"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25, options=flags)
        stream.height, stream.width, stream.pix_fmt = 48, 128, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

    def combs(clip):
        return np.abs(np.diff(clip[:, 4:-4, :, 0].astype(int), axis=1)).mean()

    clip = read_clip(path, 14, fps=25, start=0.08)
    assert combs(clip) < combs(frames[2:16]) / 4
    left = [int(np.argmax(frame[24, :, 0] > 128)) for frame in clip]
    assert np.abs(np.diff(left) - 4).max() <= 1 and abs(left[0] - 18) <= 2


# ---- files that are no videos ----


def test_names_that_look_like_protocols(tmp_path, monkeypatch):
    encode(tmp_path / "clip.mp4", numbered(14), 7).rename(tmp_path / "a:b.mp4")
    monkeypatch.chdir(tmp_path)
    assert numbers(read_clip("a:b.mp4")) == list(range(14)) and video.duration("a:b.mp4") == 2
    write_video("b:c/d:e.mp4", numbered(3))
    assert numbers(read_clip("b:c/d:e.mp4", num_frames=3)) == [0, 1, 2]


def test_pipes_and_sockets_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(os.path.relpath(tmp_path / "socket.mp4"))
        for name in (tmp_path / "pipe.mp4", tmp_path / "socket.mp4", "/dev/zero"):
            with pytest.raises(VideoError, match="not a regular file"):
                read_clip(name)
            with pytest.raises(VideoError, match="not a regular file"):
                video.duration(name)


def test_playlists_reach_no_network(tmp_path):
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:1/a.ts\n")
    with pytest.raises(VideoError, match="list.mp4: cannot read"):
        read_clip(tmp_path / "list.mp4")


@pytest.mark.parametrize("error", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), MemoryError(), KeyError("x")])
def test_whatever_a_library_raises_is_the_fault_of_the_file(tmp_path, monkeypatch, error):
    path = encode(tmp_path / "clip.mp4", numbered(14), 7)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(VideoError, match="clip.mp4: cannot read the video: ."):
        read_clip(path)


def test_decoders_of_several_threads_do_not_mix_complaints(tmp_path, capfd):
    sound = encode(tmp_path / "sound.mp4", textured(150), 25, preset="ultrafast", **OPEN_GOP)
    content = bytearray(sound.read_bytes())
    at = len(content) // 2
    content[at : at + 60] = bytes(byte ^ 0xFF for byte in content[at : at + 60])
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    results: dict[int, object] = {}

    def read(n):
        try:
            results[n] = numbers(read_clip(damaged if n % 2 else sound, start=2))
        except VideoError as error:
            results[n] = error

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(results[n], VideoError) if n % 2 else results[n] == at_7_fps(25, 2) for n in range(8))
    assert not capfd.readouterr().err  # FFmpeg's messages are for the reader alone
