"""UCF-101 (Soomro et al., arXiv 1212.0402) from files the user has: AVI videos and the official split lists.

The folder may be laid out in any way: videos are known by their names (`v_Archery_g01_c01.avi`), lists by theirs
(`testlist01.txt`). So the archives as unpacked by hand will do, and so does the download folder of tensorflow-datasets
(`downloads/extracted`). What tensorflow-datasets makes of them will not: it stores JPEG frames without times, and its
video feature cannot be read without TensorFlow.
"""

from pathlib import Path

from sfv_jax.data.video import VideoError

SPLITS = tuple(f"{kind}list0{n}" for kind in ("train", "test") for n in (1, 2, 3))
WHERE = "both are on www.crcv.ucf.edu/data/UCF101.php: UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip"


def videos(folder: str | Path, split: str = "testlist01") -> list[Path]:
    """The videos of a split, in the order of its list.

    Args:
      split: one of `SPLITS`, or "all" for every video, sorted by name.
    Raises:
      VideoError: if videos or list are missing, or the list names videos that are.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VideoError(f"{folder}: not a directory")
    if (folder / "dataset_info.json").is_file():
        raise VideoError(
            f"{folder} was prepared by tensorflow-datasets: JPEG frames, readable with TensorFlow only. Name the folder"
            " of AVI files instead, such as its downloads/extracted"
        )
    found = {path.stem: path for path in sorted(folder.rglob("v_*.avi"))}
    if not found:
        raise VideoError(f"{folder} holds no UCF-101 video (v_*.avi); {WHERE}")
    if split == "all":
        return [found[name] for name in sorted(found)]
    if split not in SPLITS:
        raise VideoError(f"split {split!r}: choose one of {', '.join(SPLITS)}, all")
    lists = sorted(folder.rglob(f"{split}.txt"))
    if not lists:
        raise VideoError(f"{folder} holds no {split}.txt; {WHERE}")
    # A line of a train list ends in the number of the class.
    names = [Path(line.split()[0]).stem for line in lists[0].read_text().splitlines() if line.strip()]
    missing = [name for name in names if name not in found]
    if missing or not names:
        few = ", ".join(missing[:3])
        raise VideoError(f"{len(missing)} of {len(names)} videos of {lists[0]} are not in {folder}: {few}")
    return [found[name] for name in names]
