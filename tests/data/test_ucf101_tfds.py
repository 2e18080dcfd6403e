"""UCF-101 prepared by tensorflow-datasets: a miniature of its builder's output, read without TensorFlow."""

import dataclasses
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from sfv_jax.data import ucf101
from sfv_jax.data.video import VideoError
from sfv_jax.evaluation import features, request, scoring
from sfv_jax.evaluation.clips import Clip
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.generation import Model
from sfv_jax.evaluation.protocol import Protocol

LENGTHS = {"train": [1], "test": [15, 10]}
FRAMES = 50
SMALL = dict(height=24, width=32, score_height=24, score_width=32)


def level(clip: int, frame: int) -> int:
    """Returns the gray level of a frame, which identifies clip and frame."""
    return 4 * frame + clip


def example(clip: int, size: tuple[int, int], frames: int) -> bytes:
    """Returns a serialized record: a list of JPEG files and a label."""
    message = tf_example_pb2.Example()
    for n in range(frames):
        pixels = np.full((*size, 3), level(clip, n), np.uint8)
        pixels[: size[0] // 2, : size[1] // 4] = (250, 0, 0)  # top left
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
        message.features.feature["video"].bytes_list.value.append(file.getvalue())
    message.features.feature["label"].int64_list.value.append(clip % 101)
    return message.SerializeToString()


def write_shard(path: Path, records: list[bytes], kind: str) -> None:
    if kind == "array_record":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    else:
        path.write_bytes(b"".join(struct.pack("<Q", len(x)) + bytes(4) + x + bytes(4) for x in records))


def prepare(root: Path, config: str, kind: str, size: tuple[int, int]) -> Path:
    """Writes a folder like that of `tfds build ucf101/CONFIG`, of 26 videos; the fourth of the test split is short."""
    folder = root / "ucf101" / config / "2.0.0"
    folder.mkdir(parents=True)
    for split, lengths in LENGTHS.items():
        first = 0
        for k, length in enumerate(lengths):
            clips = range(first, first + length)
            records = [example(n, size, 20 if (split, n) == ("test", 3) else FRAMES) for n in clips]
            write_shard(folder / f"ucf101-{split}.{kind}-{k:05d}-of-{len(lengths):05d}", records, kind)
            first += length
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits = [{"name": k, "shardLengths": [*map(str, v)], "filepathTemplate": template} for k, v in LENGTHS.items()]
    info = {"name": "ucf101", "configName": config, "version": "2.0.0", "fileFormat": kind, "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One data directory with three configurations, in both file formats."""
    root = tmp_path_factory.mktemp("tensorflow_datasets")
    prepare(root, "ucf101_1_256", "array_record", (32, 32))
    prepare(root, "ucf101_2", "tfrecord", (240, 320))
    return root


@pytest.mark.parametrize(("split", "kind"), [("testlist01", "array_record"), ("testlist02", "tfrecord")])
def test_frames_are_those_on_screen_at_25_fps(root, split, kind):
    videos, about = ucf101.videos(root, split)
    assert list(videos) == [f"test-{n:05d}" for n in range(25)] and about["file_format"] == kind
    clip = videos["test-00017"].read(num_frames=5, fps=7.0)  # in the second shard
    assert clip.shape == (5, 240, 320, 3) and clip.dtype == np.uint8
    shown = [int(25 * k / 7) for k in range(5)]
    assert np.abs(clip[:, 200, 200].astype(int) - [[level(17, n)] * 3 for n in shown]).max() <= 2
    assert (clip[:, 60, 40, 0] > 200).all() and (clip[:, 60, 40, 1:] < 60).all()  # RGB, upright
    assert len(videos["test-00017"].read(14, 7.0)) == 14
    with pytest.raises(VideoError, match="test-00003: too short: 6 of 14 frames at 7 fps"):
        videos["test-00003"].read(14, 7.0)


def test_what_the_preparation_lost_is_told(root):
    _, about = ucf101.videos(root, "testlist01")
    assert about["config"] == "ucf101_1_256" and about["version"] == "2.0.0"
    assert about["frame_encoding"] == "JPEG" and about["split"] == "testlist01"
    assert about["frame_rate"] == "25 (assumed; not stored)" and "not stored" in about["file_names"]
    assert about["frame_size"] == "32x32 stretched to 320x240 (bicubic)"
    assert ucf101.videos(root, "trainlist02")[1]["frame_size"] == "320x240"
    assert len(ucf101.videos(root / "ucf101/ucf101_2", "all")[0]) == 26


def test_a_score_carries_its_source(root, tmp_path):
    asked = request.Request(out=tmp_path, dataset="ucf101", data=root, split="testlist01")
    dataset = request.dataset_of(asked)
    still = lambda images, *, num_frames, **_: np.stack([np.repeat(x[None], num_frames, 0) for x in images])  # noqa: E731
    colours = lambda x: x.astype(np.float32).mean((2, 3)).reshape(len(x), -1)  # noqa: E731
    protocol, kept = Protocol(n=20, **SMALL), tmp_path / "kept.npz"
    model, extractor = Model(still, {"checkpoint": "still"}), Extractor(colours, {"kind": "function"})
    extras = scoring.Extras(flow=False, shown=1)
    report = scoring.checkpoint_on_videos(
        model, dataset, tmp_path / "out", protocol, extractor, kept=kept, extras=extras
    )
    assert report.record["source"] == dataset.source and "frame_rate 25 (assumed; not stored)" in report.page()
    manifest = json.loads((tmp_path / "out/generated/manifest.json").read_text())
    assert manifest["origin"]["source"]["config"] == "ucf101_1_256"
    # Names are numbers, the same for every configuration: the source distinguishes stored features.
    other = request.dataset_of(dataclasses.replace(asked, split="testlist02"))
    with pytest.raises(features.StatisticsError, match="config is ucf101_1_256 there, ucf101_2 here; file_format"):
        features.features_of(other, protocol, extractor, kept=kept)


def test_what_cannot_be_read(root, tmp_path):
    with pytest.raises(VideoError, match="no folder holds the split testlist03 .*ucf101_1_256.*name the folder"):
        ucf101.videos(root, "testlist03")
    with pytest.raises(VideoError, match="several folders hold the split all"):
        ucf101.videos(root, "all")
    for kind in ("array_record", "tfrecord"):
        folder = prepare(tmp_path / kind, "ucf101_1", kind, (16, 16))
        shard = folder / f"ucf101-test.{kind}-00001-of-00002"
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-10])
        with pytest.raises(VideoError, match="damaged shard of test|holds 24 of 25 records of test.*tfds build"):
            ucf101.videos(folder)
        shard.unlink()
        with pytest.raises(VideoError, match=r"00001-of-00002 is missing \(1 of 2 shards\): prepare .* `tfds build"):
            ucf101.videos(folder)
        write_shard(shard, [b"no example"] * 9 + [example(9, (16, 16), 0)], kind)
        videos, _ = ucf101.videos(folder)
        with pytest.raises(VideoError, match="test-00015: cannot read the record"):
            videos["test-00015"].read()
        with pytest.raises(VideoError, match="test-00024: too short: 0 of 14"):
            videos["test-00024"].read()
    info = json.loads((folder / "dataset_info.json").read_text())
    for changes, message in (
        ({"fileFormat": "riegeli"}, "stored as riegeli, which is not read here"),
        ({"splits": []}, "has no split test: its preparation did not finish"),
    ):
        (folder / "dataset_info.json").write_text(json.dumps(info | changes))
        with pytest.raises(VideoError, match=message):
            ucf101.videos(folder)
    del info["configName"]  # the path contains it too
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert ucf101.videos(folder, "trainlist01")[1]["config"] == "ucf101_1"
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(VideoError, match="dataset_info.json (does not exist|cannot be used)"):
        ucf101.videos(folder)


def test_a_frame_that_is_no_picture():
    message = tf_example_pb2.Example()
    message.features.feature["video"].bytes_list.value.extend([b"\xff\xd8 no JPEG"] * 60)
    video = ucf101.Recorded([message.SerializeToString()], 0, "test-00000")
    with pytest.raises(VideoError, match="test-00000: cannot read a frame"):
        video.read()


def test_packed_b_frames_as_in_the_avi_files_of_ucf101(tmp_path):
    """XviD with two pictures in one packet, then an empty packet: the frames at 7 of 25 per second."""
    content = (Path(__file__).parent / "cases/xvid_packed_b.avi").read_bytes()
    (tmp_path / "v_Archery_g01_c01.avi").write_bytes(content)
    (tmp_path / "testlist01.txt").write_bytes(b"Archery/v_Archery_g01_c01.avi\n\xff")
    with pytest.raises(VideoError, match="1 of the 2 videos"):
        ucf101.videos(tmp_path)
    (tmp_path / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    found, _ = ucf101.videos(tmp_path)
    clip = Clip(found["v_Archery_g01_c01"], "", "v_Archery_g01_c01", None).read(14, 7.0)
    bars = clip[:, 116:124, 20::40].mean((1, 3)) > 128
    assert (bars @ (1 << np.arange(8))).tolist() == [int(25 * k / 7 + 1e-3) for k in range(14)]
