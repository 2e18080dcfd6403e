"""Reader of UCF-101 prepared by tensorflow-datasets, without TensorFlow.

The reader of tensorflow-datasets needs TensorFlow: its `Video` feature takes its dtype from there. The files do not:
`dataset_info.json` contains the lengths of the shards, and the shards (ArrayRecord or TFRecord) contain
`tf.train.Example` messages whose list `video` has the frames as JPEG files.

The preparation loses the frame rate and the name of an AVI file, and quality to JPEG. Configurations that end in `_256`
also lose the size. The description `about`, which every score records, lists the assumptions made instead.
"""

import io
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from sfv_jax.data.video import VideoError
from sfv_jax.runtime.files import FileError, read_json

FPS = 25.0  # of all videos, by the paper of UCF-101 (arXiv 1212.0402)
SIZE = (240, 320)  # height and width of all videos, by the same paper
PREPARE = "prepare it with `tfds build ucf101/ucf101_1 --file_format=array_record`"


class Records(Protocol):
    """Serialized records with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


@dataclass(frozen=True)
class Recorded:
    """Video `index` of the `records` of a split; `name` is a number, because file names are not stored."""

    records: Records
    index: int
    name: str

    def read(self, num_frames: int = 14, fps: float = 7.0) -> np.ndarray:
        """Reads a clip like `video.read_clip`, assuming the rate `FPS`.

        Frames of another size are stretched to `SIZE`, bicubic.

        Returns:
          uint8 `[t, 240, 320, 3]` RGB; frame k is the one on screen at k / `fps` seconds.
        Raises:
          VideoError: if the video cannot be read or is too short.
        """
        stored = self.stored()
        # A millisecond of tolerance, as for files, whose clocks round.
        picked = [int(time * FPS) for time in np.arange(num_frames) / fps + 1e-3]
        if picked[-1] >= len(stored):
            have = sum(n < len(stored) for n in picked)
            raise VideoError(f"{self.name}: too short: {have} of {num_frames} frames at {fps:g} fps from 0 s")
        frames = [self.picture(stored[n]).convert("RGB") for n in picked]
        size = SIZE[::-1]
        return np.stack([np.asarray(x if x.size == size else x.resize(size, Image.Resampling.BICUBIC)) for x in frames])

    def stored(self) -> Sequence[bytes]:
        """Returns the encoded frames.

        Raises:
          VideoError: if the record cannot be read.
        """
        try:
            # Protobuf defines the class at import.
            example = tf_example_pb2.Example.FromString(self.records[self.index])  # pyrefly: ignore[missing-attribute]
        except Exception as error:  # whatever a damaged file makes a library raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise VideoError(f"{self.name}: cannot read the record: {reason}") from error
        return example.features.feature["video"].bytes_list.value

    def picture(self, encoded: bytes) -> Image.Image:
        """Decodes one of `stored`.

        Raises:
          VideoError: if it is not an image.
        """
        try:
            image = Image.open(io.BytesIO(encoded))
            image.load()
        except Exception as error:  # whatever a damaged file makes a library raise
            raise VideoError(f"{self.name}: cannot read a frame: {str(error) or type(error).__name__}") from error
        return image


def folders(root: Path) -> list[Path]:
    """Returns the folders of prepared UCF-101 datasets in or below `root`, one per configuration and version."""
    return [path.parent for path in sorted(root.rglob("dataset_info.json")) if _json(path).get("name") == "ucf101"]


def videos(root: Path, split: str) -> tuple[dict[str, Recorded], dict]:
    """Finds the videos of a split.

    Args:
      root: folder in which `folders` finds at least one dataset.
      split: official split or "all"; `testlist01` is the test split of the configurations `ucf101_1` and
        `ucf101_1_256`, "all" is both splits.
    Returns:
      videos: the videos by number, in the stored order.
      about: `split`, `form`, `config`, `version`, `file_format`, and the assumptions about facts that are not stored.
    Raises:
      VideoError: if no dataset or several datasets have the split, or shards are missing or truncated.
    """
    found = {folder: _json(folder / "dataset_info.json") for folder in folders(root)}
    fitting = {k: info for k, info in found.items() if split == "all" or split[-1] == _number(k, info)}
    if len(fitting) != 1:
        which = "several folders hold" if fitting else "no folder holds"
        names = ", ".join(str(folder) for folder in fitting or found)
        raise VideoError(f"{which} the split {split} ({names}): name the folder of one, or another --split")
    [(folder, info)] = fitting.items()
    parts = ("train", "test") if split == "all" else (split.removesuffix("list0" + split[-1]),)
    lengths = {x["name"]: [int(n) for n in x.get("shardLengths", [])] for x in info.get("splits", [])}
    clips = {}
    for part in parts:
        if not lengths.get(part):
            raise VideoError(f"{folder} has no split {part}: its preparation did not finish; {PREPARE}")
        records = _records(folder, part, info.get("fileFormat") or "tfrecord", lengths[part])
        clips |= {f"{part}-{n:05d}": Recorded(records, n, f"{part}-{n:05d}") for n in range(len(records))}
    return clips, {"split": split} | _about(folder, info, next(iter(clips.values())))


def _config(folder: Path, info: dict) -> str:
    """Returns the name of the configuration, from the info or else from the path."""
    return info.get("configName") or folder.absolute().parent.name


def _number(folder: Path, info: dict) -> str | None:
    """Returns the number of the official split of a configuration, "1" to "3"; None if its name has none."""
    match = re.match(r"ucf101_([123])", _config(folder, info))
    return match and match[1]


def _about(folder: Path, info: dict, first: Recorded) -> dict:
    encoded = first.stored()
    if not encoded:
        raise VideoError(f"{folder}: {first.name} has no frames: {PREPARE}")
    picture = first.picture(encoded[0])
    (width, height), (h, w) = picture.size, SIZE
    stretched = "" if (height, width) == SIZE else f" stretched to {w}x{h} (bicubic)"
    return {
        "form": "prepared by tensorflow-datasets",
        "config": _config(folder, info),
        "version": info.get("version"),
        "file_format": info.get("fileFormat") or "tfrecord",
        "frame_rate": f"{FPS:g} (assumed; not stored)",
        "file_names": "not stored; clips are numbered",
        "frame_size": f"{width}x{height}{stretched}",
        "frame_encoding": picture.format,
    }


def _records(folder: Path, split: str, kind: str, lengths: list[int]) -> Records:
    """Opens the records of a split."""
    total = len(lengths)
    paths = [folder / f"ucf101-{split}.{kind}-{n:05d}-of-{total:05d}" for n in range(total)]
    missing = [path for path in paths if not path.is_file()]
    if kind not in ("array_record", "tfrecord"):
        raise VideoError(f"{folder} is stored as {kind}, which is not read here: {PREPARE}")
    if missing:
        raise VideoError(f"{missing[0]} is missing ({len(missing)} of {total} shards): {PREPARE}")
    try:
        records = ArrayRecordDataSource([*map(os.fspath, paths)]) if kind == "array_record" else TFRecords(paths)
        count = len(records)
    except RuntimeError as error:
        raise VideoError(f"{folder} holds a damaged shard of {split}: {PREPARE} again") from error
    if count != sum(lengths):
        raise VideoError(f"{folder} holds {count} of {sum(lengths)} records of {split}: {PREPARE} again")
    return records


class TFRecords:
    """Random access to the records of TFRecord files by an index of their positions. Checksums are not verified.

    A record is its length (uint64, little-endian), a checksum of that (4 bytes), the data, a checksum of those.
    """

    def __init__(self, paths: Sequence[Path]):
        self._places = [(path, *place) for path in paths for place in _places(path)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, n: int) -> bytes:
        path, start, length = self._places[n]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)


def _places(path: Path) -> list[tuple[int, int]]:
    """Returns (start, length) of the data of each whole record of a file."""
    places, start, end = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while start + 16 <= end:
            file.seek(start)
            (length,) = struct.unpack("<Q", file.read(8))
            places.append((start + 12, length))
            start += 16 + length
    return places[: len(places) - (start > end)]


def _json(path: Path) -> dict:
    try:
        return read_json(path, "prepare the dataset again")
    except FileError as error:
        raise VideoError(str(error)) from error
