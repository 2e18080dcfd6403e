"""Trains a teacher on the procedural world, distills it into one step, and compares the two; in minutes.

    python -m sfv_jax.quickstart --workdir runs/quickstart

Writes to the workdir: `teacher/` and `sfv/` (ordinary training runs, which the same command continues), and the
comparison as `comparison.png`, `comparison.gif`, `table.md` and `table.json`. Scores are exact, because every legal
continuation is known.
"""

import json
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_folder

FLAGS = flags.FLAGS


def main() -> None:
    check_folder(Path(FLAGS.workdir), f"--workdir={FLAGS.workdir}")
    from sfv_jax.config import world_of
    from sfv_jax.config_check import check
    from sfv_jax.reproduction.strips import compare, picture, table
    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.files import write_text
    from sfv_jax.sampling.sampler import Sampler
    from sfv_jax.training.alarms import TrainingStopped
    from sfv_jax.training.loop import train

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    workdir, began = Path(FLAGS.workdir), time.monotonic()
    student = FLAGS.sfv.copy_and_resolve_references()
    student.init = str(workdir / "teacher")
    for config in (FLAGS.teacher, student):
        check(config)
    for title, config, name in (
        ("1/3 teacher: denoising on the procedural world", FLAGS.teacher, "teacher"),
        ("2/3 SF-V: one step, from the teacher's weights", student, "sfv"),
    ):
        print(title)
        if train(config, workdir / name)["step"] < config.steps:
            raise TrainingStopped(f"{workdir / name} was asked to stop; run the same command again to continue")
    print("3/3 comparison on held-out clips")
    world = world_of(FLAGS.sfv)
    rows, clips = compare(world, *(Sampler.load(workdir / name) for name in ("teacher", "sfv")))
    picture(clips, workdir / "comparison.png")
    text = table(rows, world.directions)
    write_text(workdir / "table.md", text + "\n")
    write_text(workdir / "table.json", json.dumps(rows, indent=1))
    minutes = (time.monotonic() - began) / 60
    print(f"\n{text}\n\nLook at {workdir / 'comparison.png'}. {minutes:.1f} minutes in all.")


def define_flags() -> None:
    config_flags.DEFINE_config_file("teacher", "configs/quickstart.py:teacher", "config of the teacher")
    config_flags.DEFINE_config_file("sfv", "configs/quickstart.py:sfv", "config of SF-V")
    flags.DEFINE_string("workdir", "runs/quickstart", "folder for all results")
    commands.refuse_empty("workdir")
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)
