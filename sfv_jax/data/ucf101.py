"""UCF-101 (Soomro et al., arXiv 1212.0402) from local files: AVI videos and the official split lists.

The folder may have any layout: videos are found by their names (`v_Archery_g01_c01.avi`), lists by theirs
(`testlist01.txt`), so archives unpacked by hand work, as does the download folder of tensorflow-datasets
(`downloads/extracted`). Without AVI files, a dataset prepared by tensorflow-datasets is read: `data.ucf101_tfds`.
"""

from pathlib import Path

from sfv_jax.data import ucf101_tfds
from sfv_jax.data.listing import list_files
from sfv_jax.data.ucf101_tfds import Recorded
from sfv_jax.data.video import VideoError

SPLITS = tuple(f"{kind}list0{n}" for kind in ("train", "test") for n in (1, 2, 3))
WHERE = "both are on www.crcv.ucf.edu/data/UCF101.php: UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip"


def videos(folder: str | Path, split: str = "testlist01") -> tuple[dict[str, Path] | dict[str, Recorded], dict]:
    """Finds the videos of a split.

    Args:
      folder: the folder of the dataset.
      split: one of `SPLITS`, or "all" for every video, sorted by name.
    Returns:
      videos: the videos by name, in the order of the list.
      source: JSON description of the files, for the record of a score.
    Raises:
      VideoError: if the list, all videos, or some videos of the list are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VideoError(f"{folder}: not a directory")
    if split not in (*SPLITS, "all"):
        raise VideoError(f"split {split!r}: choose one of {', '.join(SPLITS)}, all")
    # Lists and archives differ in the case of HandstandPushups.
    found = {path.stem.lower(): path for path in list_files(folder, (".avi",)) if path.name.startswith("v_")}
    if not found and ucf101_tfds.folders(folder):
        return ucf101_tfds.videos(folder, split)
    if not found:
        raise VideoError(f"{folder} holds no UCF-101 video (v_*.avi); {WHERE}")
    names = [found[name].stem for name in sorted(found)] if split == "all" else _listed(folder, split)
    missing = [name for name in names if name.lower() not in found]
    if missing or not names:
        few = ", ".join(missing[:3])
        raise VideoError(f"{len(missing)} of the {len(names)} videos of {split}.txt are not in {folder}: {few}")
    return {name: found[name.lower()] for name in names}, {"split": split, "form": "AVI files"}


def _listed(folder: Path, split: str) -> list[str]:
    """Returns the names in the list of a split, without suffix."""
    lists = [path for path in list_files(folder, (".txt",)) if path.name == f"{split}.txt"]
    if not lists:
        raise VideoError(f"{folder} holds no {split}.txt; {WHERE}")
    # A line of a train list ends with the number of the class.
    return [Path(line.split()[0]).stem for line in lists[0].read_text(errors="replace").splitlines() if line.strip()]
