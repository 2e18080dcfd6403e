r"""Times the networks, warm and without compilation, and the matrix-product speed of the same device in the same run.

    python -m sfv_jax.benchmark                                              # SVD, 14 x 576 x 1024, bf16
    python -m sfv_jax.benchmark --train --height 448 --width 768             # the SF-V step and its parts
    python -m sfv_jax.benchmark --networks mid --num_frames 8 --height 256 --width 384 --dtype float32 \
        --compare diffusers                                                  # against torch, on the same weights
    python -m sfv_jax.benchmark --decoder tiny --compare decoders            # a tiny decoder against the VAE's

`--compare diffusers` times the UNet, the VAE decoder and the whole pipeline from images to frames in turns with those
of diffusers; with `--train`, the UNet's forward pass, and its forward and backward pass. Weights are random: time does
not depend on them. The programs are those of `sample` and `train`. Needs jax, flax, optax, orbax, einops and numpy;
`--compare` also torch and diffusers.
"""

import os
from pathlib import Path

from absl import flags

from sfv_jax import choices
from sfv_jax.errors import UserError
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_file

FLAGS = flags.FLAGS


def main() -> None:
    if FLAGS.compare == "decoders" and FLAGS.decoder == "full":
        raise UserError("--compare decoders: give --decoder, the tiny decoder that is compared with the full one")
    if FLAGS.json:
        check_file(Path(FLAGS.json), f"--json={FLAGS.json}")
    from dataclasses import fields

    from sfv_jax.performance.measurement import Request, run
    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.files import write_json

    if FLAGS.compare == "diffusers":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU
    compilation.keep_memory()
    result = run(Request(**commands.values(*(field.name for field in fields(Request)))))
    if FLAGS.json:
        write_json(Path(FLAGS.json), result)


def define_flags() -> None:
    flags.DEFINE_enum("networks", "svd", choices.NETWORKS, "sizes of the networks")
    commands.define_pixels("height", 576, "height of the video in pixels")
    commands.define_pixels("width", 1024, "width of the video in pixels")
    flags.DEFINE_integer("num_frames", None, "frames of the video; default that of the networks", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "videos per call", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", choices.DTYPES, "compute dtype, also of the VAE's decoder")
    flags.DEFINE_integer("repeats", 10, "timed warm calls", lower_bound=1)
    flags.DEFINE_boolean("train", False, "time the SF-V step instead of sampling")
    flags.DEFINE_boolean("remat", False, "recompute activations in the backward pass")
    flags.DEFINE_enum(
        "compare",
        None,
        ["diffusers", "decoders"],
        "time UNet, decoder and pipeline of diffusers in turns with ours, on the same weights; with --train, the UNet"
        " forward, and forward and backward; decoders: time the VAE's decoder in turns with that of --decoder",
    )
    flags.DEFINE_enum("decoder", "full", ["full", *choices.TINY_DECODERS], "decoder of frames: the VAE's or a tiny one")
    flags.DEFINE_string("json", None, "file for the figures as JSON")


if __name__ == "__main__":
    commands.run(main, define_flags)
