"""Times the networks, warm and apart from compilation, beside the matmul limit of the same device in the same run.

    python -m sfv_jax.benchmark                                              # SVD, 14 x 576 x 1024, bf16
    python -m sfv_jax.benchmark --train --height 448 --width 768             # the SF-V step and its parts
    python -m sfv_jax.benchmark --networks mid --num_frames 8 --height 256 --width 384 --dtype float32 \
        --compare diffusers                                                  # against torch, on the same weights

`--compare` times the UNet, the VAE decoder and the whole way from images to frames in turns with diffusers'; with
`--train` the UNet's forward pass, and its forward and backward pass. Weights are random: time does not depend on them.
The programs are those that `sample` and `train` run. Needs jax, flax, optax, orbax, einops and numpy; `--compare` also
torch and diffusers.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import jax
from absl import app, flags, logging

from sfv_jax import config as configs
from sfv_jax.config import ConfigError
from sfv_jax.performance import timing
from sfv_jax.performance.measurement import NETWORKS, Row, sampling, split, surroundings, table, training
from sfv_jax.performance.programs import Sizes
from sfv_jax.runtime import compilation
from sfv_jax.runtime.device import peak_flops, peak_memory
from sfv_jax.runtime.sharding import make_mesh

FLAGS = flags.FLAGS


def sizes_from_flags() -> tuple[Sizes, tuple[int, int]]:
    """(networks, (height, width)).

    Raises:
      ConfigError: for a size that the networks cannot make.
    """
    sizes = NETWORKS[FLAGS.networks]
    if FLAGS.num_frames:
        sizes = replace(sizes, unet=replace(sizes.unet, num_frames=FLAGS.num_frames))
    if jax.default_backend() == "cpu":
        sizes = replace(sizes, unet=replace(sizes.unet, temporal_conv="matmul"))
    size = FLAGS.height, FLAGS.width
    if any(side < sizes.downscale or side % sizes.downscale for side in size):
        raise ConfigError(f"--height {size[0]} --width {size[1]}: both must be multiples of {sizes.downscale}")
    return sizes, size


def stages(mesh, sizes: Sizes, size: tuple[int, int]) -> list[Row]:
    """Of sampling, or of the SF-V step, as the flags say."""
    if not FLAGS.train:
        return sampling(mesh, sizes, size, FLAGS.batch_size, FLAGS.dtype, FLAGS.repeats)
    config = configs.sfv()
    config.update(dict(batch_size=FLAGS.batch_size, accumulation_steps=1, dtype=FLAGS.dtype))
    if FLAGS.networks == "tiny":
        config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=16)
    sizes = replace(sizes, unet=replace(sizes.unet, remat=FLAGS.remat))
    return training(config, mesh, sizes, size, FLAGS.repeats)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    compilation.keep_memory()
    if FLAGS.compare:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU
    try:
        sizes, size = sizes_from_flags()
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        limit = timing.matmul_limit(FLAGS.dtype)
        about = surroundings()
        result = {"surroundings": about, "matmul_flops": limit, "peak_flops": peak_flops(about["device"])}
        print(f"{about['device']}: {limit / 1e12:.3g} TFLOP/s in {FLAGS.dtype} matrix products", flush=True)
        if FLAGS.compare:
            from sfv_jax.performance.against_diffusers import against_diffusers

            found = against_diffusers(sizes, size, FLAGS.batch_size, FLAGS.dtype, FLAGS.repeats, FLAGS.train)
            result["diffusers"] = found
        else:
            rows = stages(mesh, sizes, size)
            print("\n" + table(rows, limit))
            result["rows"] = [asdict(row) for row in rows]
            result["parts"] = split(rows) if FLAGS.train else {}
        for name, seconds in result.get("parts", {}).items():
            print(f"{name}: {1000 * seconds:.1f} ms")
        for peak in peak_memory().values():
            result["peak_gib"] = peak
            print(f"most memory in use on the device: {peak:.2f} GiB")
    except ConfigError as error:
        sys.exit(f"benchmark: {error}")
    if FLAGS.json:
        path = Path(FLAGS.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_enum("networks", "svd", list(NETWORKS), "sizes of the networks")
    flags.DEFINE_integer("height", 576, "of the video, pixels")
    flags.DEFINE_integer("width", 1024, "of the video, pixels")
    flags.DEFINE_integer("num_frames", None, "frames; those of the networks by default", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "videos at a time", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "compute dtype, also of the VAE decoder")
    flags.DEFINE_integer("repeats", 10, "warm calls that are timed", lower_bound=1)
    flags.DEFINE_boolean("train", False, "the SF-V step instead of sampling")
    flags.DEFINE_boolean("remat", False, "recompute activations in the backward pass")
    flags.DEFINE_enum(
        "compare",
        None,
        ["diffusers"],
        "time that package's UNet, decoder and pipeline instead, in turns with ours, on the same weights; with --train"
        " the UNet forward, and forward and backward",
    )
    flags.DEFINE_string("json", None, "write what was measured to this file")
    app.run(main)
