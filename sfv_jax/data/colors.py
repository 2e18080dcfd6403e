"""Conversion of decoded frames to 8-bit RGB as a player shows them: color matrix, HDR, gamut, orientation."""

import math
import struct

import av
import numpy as np
from av.video.reformatter import Colorspace

# Values of ITU-T H.273, which FFmpeg and files use.
_RGB, _UNSPECIFIED, _RESERVED, _YCGCO, _BT2020 = 0, 2, 3, 8, 9
_PQ, _HLG = 16, 18
_UNSUPPORTED = {
    10: "BT.2020 constant luminance",
    11: "SMPTE 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
# Linear RGB from BT.2020 to BT.709 primaries, ITU-R BT.2407.
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
_WHITE = 100.0  # cd/m2 of SDR white
_KNEE = 0.3  # fraction of SDR white above which HDR is compressed
_MOST_TILT = math.tan(math.radians(1))  # of a display matrix that still counts as upright, as for the ffmpeg command


def to_rgb(frame: av.VideoFrame, aspect: float = 1) -> np.ndarray:
    """Converts a decoded frame to RGB.

    HDR (HLG and PQ) is tone-mapped, see `_tone_mapped`; wide gamut is clipped to BT.709.

    Args:
      frame: the frame.
      aspect: width of its pixels by their height.
    Returns:
      uint8 `[h, w, 3]`, upright and with square pixels.
    Raises:
      av.error.InvalidDataError: if its color matrix or orientation is not supported.
    """
    width = max(1, round(frame.width * aspect))
    if frame.color_trc in (_PQ, _HLG) and not frame.format.is_rgb:
        rgb = _tone_mapped(_deep(frame, width), frame.color_trc)
    elif frame.colorspace == _YCGCO and not frame.format.is_rgb:
        rgb = _from_ycgco(frame, width)
    elif frame.color_primaries == _BT2020 and not frame.format.is_rgb:
        linear = np.maximum(_light(_deep(frame, width)) @ _TO_BT709.T, 0)
        rgb = _eight_bits(_coded(linear))
    else:
        rgb = frame.reformat(width=width, format="rgb24", src_colorspace=_matrix(frame)).to_ndarray()
    return _upright(rgb, frame)


def _matrix(frame: av.VideoFrame) -> Colorspace | None:
    """Returns the matrix to assume; None for that of the frame's tag.

    Video without a tag is BT.709 if larger than standard definition, by convention of players, else BT.601.
    """
    if frame.format.is_rgb:
        return None
    if frame.colorspace in _UNSUPPORTED:
        remedy = "convert the file, for example with ffmpeg -vf zscale=matrix=709 -colorspace bt709"
        name = _UNSUPPORTED[frame.colorspace]
        raise av.error.InvalidDataError(0, f"the color matrix {name} is not supported; {remedy}")
    if frame.colorspace not in (_RGB, _UNSPECIFIED, _RESERVED):
        return None
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601


def _deep(frame: av.VideoFrame, width: int) -> np.ndarray:
    """Converts a frame to nonlinear RGB of its own primaries, float32 `[h, w, 3]` in [0, 1]."""
    source = Colorspace.BT2020 if frame.colorspace in (_UNSPECIFIED, _RESERVED) else _matrix(frame)
    rgb = frame.reformat(width=width, format="rgb48le", src_colorspace=source).to_ndarray()
    return rgb.astype(np.float32) / 65535


def _tone_mapped(coded: np.ndarray, transfer: int) -> np.ndarray:
    """Converts HDR with BT.2020 primaries to SDR with BT.709 primaries.

    Light is that of a display of 1000 cd/m2 (HLG, system gamma 1.2) or absolute (PQ), in units of SDR white. The
    largest component of a pixel keeps its value up to `_KNEE` and is compressed above by the Mobius curve, which takes
    the peak to 1; the others keep their ratio to it. These are the steps of ffmpeg's
    zscale=transfer=linear:npl=100,zscale=primaries=709,tonemap=mobius.

    Args:
      coded: float32 `[h, w, 3]` in [0, 1].
      transfer: `_PQ` or `_HLG`.
    Returns:
      uint8 `[h, w, 3]`.
    """
    light, peak = (_pq(coded), 10_000) if transfer == _PQ else (_hlg(coded), 1000)
    light = np.maximum(light / _WHITE @ _TO_BT709.T, 0)
    largest = np.maximum(light.max(-1, keepdims=True), 1e-6)
    return _eight_bits(_coded(light * (_mobius(largest, peak / _WHITE) / largest)))


def _mobius(x: np.ndarray, peak: float) -> np.ndarray:
    """Returns `x` up to `_KNEE`; above, a smooth curve through (`peak`, 1)."""
    a = -(_KNEE**2) * (peak - 1) / (_KNEE**2 - 2 * _KNEE + peak)
    b = (_KNEE**2 - 2 * _KNEE * peak + peak) / (peak - 1)
    return np.where(x <= _KNEE, x, (b**2 + 2 * b * _KNEE + _KNEE**2) / (b - a) * (x + a) / (x + b))


def _hlg(coded: np.ndarray) -> np.ndarray:
    """Returns the light, in cd/m2, that a display of 1000 cd/m2 makes of HLG (ITU-R BT.2100, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(coded <= 0.5, coded**2 / 3, (np.exp((coded - c) / a) + b) / 12)
    return 1000 * scene * np.maximum(scene @ _BT2020_LUMINANCE, 1e-6)[..., None] ** 0.2


def _pq(coded: np.ndarray) -> np.ndarray:
    """Returns the light of PQ in cd/m2 (ITU-R BT.2100, table 4)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = coded ** (1 / m2)
    return 10_000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _light(coded: np.ndarray) -> np.ndarray:
    """Inverts `_coded`."""
    return np.where(coded < 0.081, coded / 4.5, ((coded + 0.099) / 1.099) ** (1 / 0.45))


def _coded(light: np.ndarray) -> np.ndarray:
    """Applies the transfer characteristic of ITU-R BT.709."""
    return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)


def _eight_bits(coded: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(coded, 0, 1)).astype(np.uint8)


def _from_ycgco(frame: av.VideoFrame, width: int) -> np.ndarray:
    """Converts a YCgCo frame (ITU-T H.273, equations 38 to 42), which swscale does not, to uint8 `[h, w, 3]`."""
    full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
    layout = "yuvj444p" if frame.format.name.startswith("yuvj") else "yuv444p"
    frame.colorspace = _UNSPECIFIED  # swscale refuses even to scale with a matrix that it cannot apply
    try:
        planes = frame.reformat(width=width, format=layout).to_ndarray().astype(np.float32)
    finally:
        frame.colorspace = _YCGCO
    luma, green, orange = planes if full else (planes - 16) * np.array([255 / 219, 255 / 224, 255 / 224])[:, None, None]
    green, orange = (green - 128, orange - 128) if full else (green - 255 / 2, orange - 255 / 2)
    rest = luma - green
    return np.round(np.clip(np.stack([rest + orange, luma + green, rest - orange], -1), 0, 255)).astype(np.uint8)


def _upright(rgb: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turns and mirrors `[h, w, 3]` by the display matrix of its frame, as the ffmpeg command does."""
    a, b, c, d = _display_matrix(frame)
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    along, across = ((b, c), (a, d)) if turned else ((a, d), (b, c))
    if max(map(abs, across)) > _MOST_TILT * max(map(abs, along)):
        angle = math.degrees(math.atan2(b, a))
        advice = "only multiples of 90 are supported; turn the file, for example with ffmpeg -i FILE OUT"
        raise av.error.InvalidDataError(0, f"the display matrix turns the picture by {angle:.0f} degrees: {advice}")
    if turned:
        rgb, (a, d) = rgb.swapaxes(0, 1), (c, b)
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """Returns a, b, c, d: pixel (x, y) is shown at (a x + c y, b x + d y) but for a shift."""
    try:
        data = bytes(frame.side_data["DISPLAYMATRIX"])  # pyrefly: ignore[bad-typed-dict-key]
    except KeyError:
        return 1, 0, 0, 1
    except ValueError:  # PyAV lists no side data if a kind among them is newer than itself
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    a, b, _, c, d, *_ = struct.unpack("=9i", data)
    return a, b, c, d
