"""Weights in and out: a diffusers StableVideoDiffusionPipeline folder to a model folder, and back.

    python -m sfv_jax.convert --src stable-video-diffusion-img2vid --dst models/svd
    python -m sfv_jax.convert --export --src models/svd --dst svd-diffusers --fp16
    python -m sfv_jax.convert --export --src runs/sfv --dst sfv-diffusers

The last takes the newest moving average of a training run, with the VAE and CLIP tower of the model it started from.
Every tensor must be accounted for, in name and shape; a conversion that stops halfway leaves nothing behind.
"""

from pathlib import Path

import jax.numpy as jnp
from absl import app, flags, logging

from sfv_jax.checkpoint import WorkdirError
from sfv_jax.runs import is_run, load_generator
from sfv_jax.weights.checkpoint import load_model, read_model, resolve_model, save_model
from sfv_jax.weights.configs import COMPONENTS
from sfv_jax.weights.folders import WeightsError, refuse_existing
from sfv_jax.weights.pipeline import load_pipeline, save_pipeline

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


def export_model(src: str, dst: str, *, variant: str | None = None, raw=False, overwrite=False) -> None:
    """Writes a model folder or the newest checkpoint of a training run, `src`, as a diffusers folder `dst`.

    Args:
      variant: "fp16" for half precision, else fp32.
      raw: of a run, the trained weights instead of their moving average.
    Raises:
      WeightsError: if `src` has no SVD networks that diffusers can express, or `dst` exists.
      WorkdirError: if the run has no checkpoint yet.
    """
    refuse_existing(Path(dst), overwrite)
    run = load_generator(src, raw=raw, codec=False) if is_run(src) else None
    model = run.model if run else resolve_model(src)
    if model is None or read_model(model)[1]["codec"] != "svd":
        raise WeightsError(f"{src} has a patch codec: diffusers knows no pipeline without SVD's VAE and CLIP")
    params, configs, meta = load_model(model, tuple(COMPONENTS) if run is None else ("vae", "image_encoder"))
    if run:
        params, configs = params | {"unet": run.params}, configs | {"unet": run.unet}
    save_pipeline(dst, params, configs, meta["scheduler"], variant=variant, overwrite=overwrite)


def report(folder: str) -> None:
    """Prints what a model folder holds."""
    _, meta = read_model(folder)
    for name, facts in meta["components"].items():
        print(f"{name:14} {facts['parameters']:>13,} parameters  {facts['dtype']}")


def define_flags() -> None:
    flags.DEFINE_string("src", None, "Folder to read.", required=True)
    flags.DEFINE_string("dst", None, "Folder to write.", required=True)
    flags.DEFINE_bool("export", False, "From a model folder or a training run to a diffusers folder.")
    flags.DEFINE_bool("fp16", False, "The fp16 variant of the diffusers files: read it, or write it with --export.")
    flags.DEFINE_bool("raw", False, "Of a training run, the trained weights instead of their moving average.")
    flags.DEFINE_enum("dtype", "source", DTYPES, "What the model folder stores.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --dst.")


def main(_) -> None:
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save
    variant = "fp16" if args.fp16 else None
    try:
        if args.export:
            export_model(args.src, args.dst, variant=variant, raw=args.raw, overwrite=args.overwrite)
        else:
            import_pipeline(args.src, args.dst, variant=variant, dtype=args.dtype, overwrite=args.overwrite)
            report(args.dst)
    except (WeightsError, WorkdirError) as error:
        raise SystemExit(f"convert: {error}") from error
    print(f"wrote {args.dst}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
