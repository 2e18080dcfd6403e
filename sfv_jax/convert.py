"""Weights in and out: a diffusers StableVideoDiffusionPipeline folder to a model folder, and back.

    python -m sfv_jax.convert --src stable-video-diffusion-img2vid --dst models/svd
    python -m sfv_jax.convert --src svd_xt.safetensors --dst models/svd-xt
    python -m sfv_jax.convert --export --src models/svd --dst svd-diffusers --fp16
    python -m sfv_jax.convert --export --src runs/sfv --dst sfv-diffusers
    python -m sfv_jax.convert --export --src runs/sfv --dst sfv.safetensors --what comfyui --fp16

Of a training run it takes the newest moving average, with the VAE and CLIP tower of the model it started from.
Every tensor must be accounted for, in name and shape; a conversion that stops halfway leaves nothing behind.
"""

from pathlib import Path

import jax.numpy as jnp
from absl import app, flags, logging

from sfv_jax.checkpoint import WorkdirError
from sfv_jax.export import WHAT, export_model
from sfv_jax.weights.checkpoint import read_model, save_model
from sfv_jax.weights.folders import WeightsError, refuse_existing, sha256
from sfv_jax.weights.pipeline import SIGMAS, load_pipeline
from sfv_jax.weights.single_file import load_single_file, open_single_file
from sfv_jax.weights.sources import open_weights

DTYPES = ("source", "float32", "float16", "bfloat16")


def import_pipeline(src: str, dst: str, *, variant: str | None = None, dtype: str = "source", overwrite=False) -> None:
    """Converts the diffusers folder `src` to the model folder `dst`.

    Args:
      variant: "fp16" to read the half precision files.
      dtype: what to store, one of `DTYPES`; "source" keeps each file's own.
    Raises:
      WeightsError: if `src` is not exactly SVD's pipeline, or `dst` exists and `overwrite` is not set.
    """
    refuse_existing(Path(dst), overwrite)
    params, configs, facts = load_pipeline(src, variant=variant, dtype=None if dtype == "source" else jnp.dtype(dtype))
    save_model(dst, params, configs, codec="svd", extra=facts, overwrite=overwrite)


def import_single_file(
    src: str, dst: str, *, num_frames: int | None = None, dtype: str = "source", overwrite=False
) -> list[str]:
    """Converts Stability's single file `src` (`svd.safetensors`, `svd_xt.safetensors`) to the model folder `dst`.

    Args:
      num_frames: as in `single_file.open_single_file`.
      dtype: what to store, one of `DTYPES`.
    Returns:
      Lines that say what was assumed and left out.
    Raises:
      WeightsError: if `src` does not hold exactly SVD's networks, or `dst` exists and `overwrite` is not set.
    """
    refuse_existing(Path(dst), overwrite)
    single = open_single_file(open_weights(src), num_frames=num_frames)
    target = None if dtype == "source" else jnp.dtype(dtype)
    params = {name: load_single_file(single, name, target) for name in single.configs}
    files = single.tensors.files
    source = {"folder": Path(src).name, "sha256": {path.name: sha256(path) for path in files}}
    extra = {"scheduler": SIGMAS | {"rho": 7.0}, "source": source}
    save_model(dst, params, single.configs, codec="svd", extra=extra, overwrite=overwrite)
    return single.notes


def report(folder: str) -> None:
    """Prints what a model folder holds."""
    _, meta = read_model(folder)
    for name, facts in meta["components"].items():
        print(f"{name:14} {facts['parameters']:>13,} parameters  {facts['dtype']}")


def define_flags() -> None:
    flags.DEFINE_string("src", None, "Folder or file to read.", required=True)
    flags.DEFINE_string("dst", None, "Folder or file to write.", required=True)
    flags.DEFINE_bool("export", False, "From a model folder or a training run to a diffusers folder.")
    flags.DEFINE_enum("what", "pipeline", WHAT, "With --export: pipeline or UNet folder, or one file.")
    flags.DEFINE_string("max_shard_size", "10GB", "With --export: larger weight files of a folder are cut into shards.")
    flags.DEFINE_bool("fp16", False, "The fp16 variant of the diffusers files: read it, or write it with --export.")
    flags.DEFINE_bool("raw", False, "Of a training run, the trained weights instead of their moving average.")
    flags.DEFINE_enum("dtype", "source", DTYPES, "What the model folder stores.")
    flags.DEFINE_integer("num_frames", None, "Frames per clip of a single file's UNet, if its name does not tell.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --dst.")


def main(_) -> None:
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save
    variant = "fp16" if args.fp16 else None
    try:
        if args.export:
            options = dict(what=args.what, raw=args.raw, max_shard_size=args.max_shard_size, overwrite=args.overwrite)
            export_model(args.src, args.dst, variant=variant, **options)
        elif Path(args.src).is_file():
            options = dict(num_frames=args.num_frames, dtype=args.dtype, overwrite=args.overwrite)
            for note in import_single_file(args.src, args.dst, **options):
                print(note)
            report(args.dst)
        else:
            import_pipeline(args.src, args.dst, variant=variant, dtype=args.dtype, overwrite=args.overwrite)
            report(args.dst)
    except (WeightsError, WorkdirError) as error:
        raise SystemExit(f"convert: {error}") from error
    print(f"wrote {args.dst}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
