"""Score videos.

    python -m sfv_jax.evaluate --videos FOLDER --out OUT

scores each video by itself: motion, optical flow, frozen videos, detail and contrast against its condition. Subfolders
of FOLDER are groups, one row of the table each. `--images` names the conditions, otherwise first frames stand for them;
`--svd` adds the similarity of SVD's CLIP tower. OUT gets `scores.json`, `scores.md` and `index.html`, a page with
tables, plots and playable clips that opens from disk. docs/evaluation.md defines every score.
"""

import sys
from importlib.metadata import version
from pathlib import Path

from absl import app, flags, logging

from sfv_jax import compiling
from sfv_jax.data.video import VideoError
from sfv_jax.evaluation import noreference
from sfv_jax.evaluation.collection import Reading, condition_images, find_clips
from sfv_jax.evaluation.motion import FlowError
from sfv_jax.evaluation.report import Report
from sfv_jax.weights.checkpoint import load_codec
from sfv_jax.weights.folders import WeightsError


def alone(videos: Path, reading: Reading, *, images: Path | None, svd: Path | None, flow: bool, shown: int) -> Report:
    """The report of a folder without a reference."""
    clips = find_clips(videos)
    conditions = condition_images(images, {clip.name for clip in clips}) if images else None
    embed = load_codec(svd).embed if svd else None
    results = noreference.score_folder(clips, reading, images=conditions, embed=embed, flow=flow, shown=shown)
    if not results.rows:
        reasons = "".join(f"\n  {line}" for line in reading.unreadable[:10])
        raise VideoError(f"none of the {len(clips)} clips in {videos} can be read:{reasons}")
    report = Report(f"Scores of {videos.name}")
    source = f"images of the same names in {images.name}" if images else "the first frame of each clip"
    noreference.add_to(report, results, reading, source)
    return report


FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)
    compiling.set_up()
    reading = Reading(FLAGS.num_frames, FLAGS.fps)
    folders = {name: FLAGS[name].value and Path(FLAGS[name].value) for name in ("images", "svd")}
    try:
        report = alone(Path(FLAGS.videos), reading, **folders, flow=FLAGS.flow, shown=FLAGS.shown)
    except (FlowError, VideoError, WeightsError) as error:
        sys.exit(f"evaluate: {error}")
    packages = {name: version(name) for name in ("sfv_jax", "jax", "numpy", "av")}
    report.record |= {"packages": packages, "videos": FLAGS.videos, **folders}
    report.write(FLAGS.out)
    for line in reading.unreadable:
        print(f"unreadable: {line}", file=sys.stderr)
    print(f"{FLAGS.out}: open index.html; scores.md and scores.json hold the numbers")


def _define_flags() -> None:
    flags.DEFINE_string("videos", None, "folder of videos; subfolders are groups", required=True)
    flags.DEFINE_string("out", None, "folder for the results", required=True)
    flags.DEFINE_string("images", None, "conditions: folder of images or videos with the clips' names")
    flags.DEFINE_string("svd", None, "model folder whose CLIP tower compares frames with the condition")
    flags.DEFINE_bool("flow", True, "optical flow, which needs OpenCV")
    flags.DEFINE_integer("num_frames", 14, "frames read of each clip", lower_bound=2)
    flags.DEFINE_float("fps", 7.0, "rate at which frames are picked, by time", lower_bound=1e-3)
    flags.DEFINE_integer("shown", 9, "clips of how many names the page plays", lower_bound=0)


if __name__ == "__main__":
    _define_flags()
    compiling.define_flags()
    app.run(main)
