"""Makes a video with the models in the package, distills SF-V from their base model, and compares; in minutes.

    python -m sfv_jax.quickstart --workdir runs/quickstart [--image PICTURE] [--from_scratch]

Writes to the workdir: `first.gif`, a video by the one-step model in the package; `sfv/`, an ordinary training run that
distills another one from the base model in the package, which the same command continues; and the comparison as
`comparison.png`, `comparison.gif`, `table.md` and `table.json`. Scores are exact, because every legal continuation is
known. With `--from_scratch` nothing is taken from the package: the runs `vae/`, `decoder/` and `teacher/` come first,
which takes hours.
"""

import json
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sfv_jax.errors import InterruptedWork
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_folder

FLAGS = flags.FLAGS
BEGAN = time.monotonic()
TRAINED = ("vae", "decoder", "teacher")  # from scratch, in this order


def main() -> None:
    check_folder(Path(FLAGS.workdir), f"--workdir={FLAGS.workdir}")
    from sfv_jax.config import world_of
    from sfv_jax.config_check import check
    from sfv_jax.data.images import read_image
    from sfv_jax.reproduction import strips
    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.files import write_text
    from sfv_jax.runtime.progress import compiling, say
    from sfv_jax.sampling.sampler import Sampler

    workdir = Path(FLAGS.workdir)
    config = FLAGS.sfv.copy_and_resolve_references()
    config.init = str(workdir / "teacher") if FLAGS.from_scratch else config.init
    check(config)
    world = world_of(config)
    image = read_image(FLAGS.image) if FLAGS.image else world.clip(0, "heldout")[0][0]
    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    if not FLAGS.from_scratch:
        say("1/3 a video by the one-step model in the package: loading it ...")
        path, packaged = workdir / "first.gif", Sampler.load("world")
        with compiling("the video"):
            strips.first_video(packaged, image, world.size, path)
        say(f"Look at {path}, after {time.monotonic() - BEGAN:.0f} seconds.")
    else:
        say("1/3 VAE, its decoder, and the base model")
        packaged = None
        train_base(workdir)
    say("2/3 SF-V: one step, from the weights of the base model")
    finish(config, workdir / "sfv")
    say("3/3 comparison on held-out clips")
    rows, clips = strips.compare(world, Sampler.load(config.init), Sampler.load(workdir / "sfv"), packaged)
    strips.picture(clips, workdir / "comparison.png")
    text = strips.table(rows)
    write_text(workdir / "table.md", text + "\n")
    write_text(workdir / "table.json", json.dumps(rows, indent=1))
    minutes = (time.monotonic() - BEGAN) / 60
    print(f"\n{text}\n\nLook at {workdir / 'comparison.png'}. {minutes:.1f} minutes in all.")


def train_base(workdir: Path) -> None:
    """Trains VAE, decoder and base model in `workdir`, or continues them."""
    from sfv_jax.training.encoders import export_encoders

    configs = {name: getattr(FLAGS, name).copy_and_resolve_references() for name in TRAINED}
    configs["decoder"].init = str(workdir / "vae")
    configs["teacher"].encoders = str(workdir / "encoders")
    for name, config in configs.items():
        if name == "teacher" and not (workdir / "encoders").exists():
            export_encoders(workdir / "decoder", workdir / "encoders")
        finish(config, workdir / name)


def finish(config, workdir: Path) -> None:
    """Trains a run to its end.

    Raises:
      InterruptedWork: if it was stopped before.
    """
    from sfv_jax.training.loop import train

    if train(config, workdir)["step"] < config.steps:
        raise InterruptedWork(f"the training in {workdir} was stopped; run the same command again to continue")


def define_flags() -> None:
    config_flags.DEFINE_config_file("sfv", "configs/world.py:quick", "config of SF-V")
    config_flags.DEFINE_config_file("vae", "configs/vae.py", "config of the VAE, with --from_scratch")
    config_flags.DEFINE_config_file("decoder", "configs/vae.py:decoder", "config of its decoder, with --from_scratch")
    config_flags.DEFINE_config_file("teacher", "configs/world.py:teacher", "config of the base, with --from_scratch")
    flags.DEFINE_string("workdir", "runs/quickstart", "folder for all results")
    flags.DEFINE_string("image", "", "image for the first video, cropped to a square; empty: a held-out first frame")
    flags.DEFINE_bool("from_scratch", False, "train VAE and base model, too, instead of taking them from the package")
    commands.refuse_empty("workdir")
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)
