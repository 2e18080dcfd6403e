"""Converts a folder of videos to a latent cache for training.

    python -m sfv_jax.prepare --videos clips/ --svd models/svd --out cache/

Videos are decoded, resampled by timestamp, resized and cropped on the CPU while the accelerator encodes. Unusable
files are skipped and listed, with the reason, at the end and in `manifest.json`. The same command continues after an
interruption: finished shards are kept. Several workers share a job with `--worker` and `--workers`; the last one to
finish completes the cache.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from sfv_jax.data.listing import VIDEO_SUFFIXES, list_videos
from sfv_jax.data.settings import PrepareError, Settings
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_folder, one_line

FLAGS = flags.FLAGS


def _settings_with_flags() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(Settings) if field.name != "model"]


def define_flags() -> None:
    commands.define_required("videos", "folder of videos, searched recursively")
    commands.define_required("svd", "model folder made by sfv_jax.convert, or diffusers folder")
    commands.define_required("out", "folder of the cache")
    flags.DEFINE_integer("batch_size", 1, "clips encoded at a time", lower_bound=1)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "number of decoding threads", lower_bound=1)
    flags.DEFINE_integer("worker", 0, "index of this worker, from 0", lower_bound=0)
    flags.DEFINE_integer("workers", 1, "number of processes that share the job", lower_bound=1)
    define: dict[Any, Callable[..., Any]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for field in _settings_with_flags():
        default = None if field.name == "num_frames" else field.default
        define[field.type](field.name, default, field.metadata["help"])
    commands.define_size()
    commands.define_compiler_flags()


def main() -> None:
    commands.apply_size()
    given = commands.values(*(field.name for field in _settings_with_flags()))
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    if FLAGS.worker >= FLAGS.workers:
        raise PrepareError(f"worker {FLAGS.worker} of {FLAGS.workers}: count from 0")
    commands.check_inputs("videos", "svd")
    check_folder(Path(FLAGS.out), f"--out={FLAGS.out}")
    if not list_videos(FLAGS.videos):
        raise PrepareError(f"{FLAGS.videos}: no video files ({', '.join(VIDEO_SUFFIXES)})")

    from sfv_jax.checkpoints.base import clip_length, load_encoders
    from sfv_jax.data.preparation import make_encoder, run
    from sfv_jax.runtime import compilation

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    codec, model = load_encoders(FLAGS.svd)
    if FLAGS.num_frames is None:
        settings = dataclasses.replace(settings, num_frames=clip_length(FLAGS.svd) or settings.num_frames)
    encode = make_encoder(codec, settings.noise_aug_strength, settings.seed)
    sharing = commands.values("batch_size", "threads", "worker", "workers")
    manifest = run(FLAGS.videos, FLAGS.out, encode, dataclasses.replace(settings, model=model), **sharing)
    if manifest:
        for entry in manifest["skipped"]:
            print(f"skipped {one_line(entry['clip'])}: {entry['reason']}")
        clips = ", ".join(f"{count} clips in {split}" for split, count in manifest["clips"].items())
        print(f"{FLAGS.out}: {clips}, {len(manifest['skipped'])} skipped")


if __name__ == "__main__":
    commands.run(main, define_flags)
