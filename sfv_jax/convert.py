"""Weights in and out: SVD in any of its usual formats to a model folder, and back.

    python -m sfv_jax.convert --src stable-video-diffusion-img2vid --dst models/svd
    python -m sfv_jax.convert --src hub:stabilityai/stable-video-diffusion-img2vid --dst models/svd
    python -m sfv_jax.convert --src svd_xt.safetensors --dst models/svd-xt
    python -m sfv_jax.convert --src AnimateLCM-SVD-xt.safetensors --base models/svd-xt --dst models/animatelcm
    python -m sfv_jax.convert --export --src models/svd --dst svd-diffusers --fp16
    python -m sfv_jax.convert --export --src runs/sfv --dst sfv-diffusers
    python -m sfv_jax.convert --export --src runs/sfv --dst sfv.safetensors --what comfyui --fp16

Of a training run it takes the newest moving average, with the VAE and CLIP tower of the model it started from.
Every tensor must be accounted for, in name and shape; a conversion that stops halfway leaves nothing behind.
"""

import signal
import sys

from absl import flags

from sfv_jax import choices
from sfv_jax.runtime import commands


def report(folder: str) -> None:
    """Prints what a model folder holds."""
    from sfv_jax.checkpoints.model_folder import read_model

    _, meta = read_model(folder)
    for name, facts in meta["components"].items():
        print(f"{name:14} {facts['parameters']:>13,} parameters  {facts['dtype']}")


def define_flags() -> None:
    flags.DEFINE_string("src", None, "Folder, file or hub:ORG/NAME to read.", required=True)
    flags.DEFINE_string("dst", None, "Folder or file to write.", required=True)
    flags.DEFINE_string("base", None, "For a UNet alone: the model folder with the VAE, CLIP tower and config.")
    flags.DEFINE_bool("allow_pickle", False, "Read .bin and .ckpt files too, by torch, their tensors only.")
    flags.DEFINE_bool("export", False, "From a model folder or a training run to a diffusers folder.")
    flags.DEFINE_enum("what", "pipeline", choices.EXPORTS, "With --export: pipeline or UNet folder, or one file.")
    flags.DEFINE_string("max_shard_size", "10GB", "With --export: larger weight files of a folder are cut into shards.")
    flags.DEFINE_bool("fp16", False, "The fp16 variant of the diffusers files: read it, or write it with --export.")
    flags.DEFINE_bool("raw", False, "Of a training run, the trained weights instead of their moving average.")
    flags.DEFINE_enum("dtype", "source", choices.STORED_DTYPES, "What the model folder stores.")
    flags.DEFINE_integer("num_frames", None, "Frames per clip of a single file's UNet, if its name does not tell.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --dst.")


def main() -> None:
    from sfv_jax.checkpoints.exporter import export_model
    from sfv_jax.checkpoints.importer import import_model

    args = flags.FLAGS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("convert: stopped by SIGTERM"))  # so that folders are cleared
    variant = "fp16" if args.fp16 else None
    try:
        if args.export:
            options = commands.values("what", "raw", "max_shard_size", "overwrite")
            export_model(args.src, args.dst, variant=variant, **options)
        else:
            options = commands.values("num_frames", "allow_pickle", "overwrite", "base", "dtype")
            for note in import_model(args.src, args.dst, variant=variant, verbose=True, **options):
                print(note)
            report(args.dst)
    except KeyboardInterrupt:
        raise SystemExit("convert: stopped") from None
    print(f"wrote {args.dst}")


if __name__ == "__main__":
    commands.run(main, define_flags)
