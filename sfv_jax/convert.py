"""Converts SVD's weights from any of their usual formats to a model folder, and back.

    python -m sfv_jax.convert --src stable-video-diffusion-img2vid --dst models/svd
    python -m sfv_jax.convert --src hub:stabilityai/stable-video-diffusion-img2vid --dst models/svd
    python -m sfv_jax.convert --src svd_xt.safetensors --dst models/svd-xt
    python -m sfv_jax.convert --src AnimateLCM-SVD-xt.safetensors --base models/svd-xt --dst models/animatelcm
    python -m sfv_jax.convert --export --src models/svd --dst svd-diffusers --fp16
    python -m sfv_jax.convert --export --src runs/sfv --dst sfv-diffusers
    python -m sfv_jax.convert --export --src runs/sfv --dst sfv.safetensors --what comfyui --fp16
    python -m sfv_jax.convert --export --src runs/vae --dst models/encoders --what encoders
    python -m sfv_jax.convert --src runs/decoder --dst models/svd/tiny_decoder
    python -m sfv_jax.convert --src taesdv.pth --allow_pickle --dst models/svd/tiny_decoder
    python -m sfv_jax.convert --export --src models/svd/tiny_decoder --dst decoder.safetensors --what taesdv
    python -m sfv_jax.convert --export --src runs/world_decoder --dst models/world-decoder --what model --fp16

A `--dst` named `tiny_decoder`, in a model folder, receives a tiny decoder of that model: from the run that trained it,
another such folder, or a file under TAESDV's names. The export of a training run contains the newest moving average,
with the VAE and CLIP tower of the run's base model. Every tensor must have a known name and shape; an interrupted
conversion leaves nothing behind.
"""

import signal
import sys
from pathlib import Path

from absl import flags

from sfv_jax import choices
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_folder
from sfv_jax.weights.folders import WeightsError, refuse_existing
from sfv_jax.weights.writer import parse_size


def report(folder: str) -> None:
    """Prints the components of a model folder."""
    from sfv_jax.checkpoints.model_folder import read_model

    for name, facts in read_model(folder).meta["components"].items():
        print(f"{name:14} {facts['parameters']:>13,} parameters  {facts['dtype']}")


def define_flags() -> None:
    commands.define_required("src", "folder, file or hub:ORG/NAME to read")
    commands.define_required("dst", "folder or file to write")
    flags.DEFINE_string("base", None, "model folder with the networks that --src lacks, such as the VAE and CLIP tower")
    flags.DEFINE_bool("allow_pickle", False, "read .bin and .ckpt files too, by torch, tensors only")
    flags.DEFINE_bool("export", False, "convert a model folder or a training run to other formats")
    flags.DEFINE_enum(
        "what",
        "pipeline",
        choices.EXPORTS,
        "output of --export: folder of the pipeline or the UNet for diffusers; one file for ComfyUI; a packed model "
        "folder; or the VAE of a training run with the CLIP tower of --base or a random one",
    )
    flags.DEFINE_string("max_shard_size", "10GB", "size above which --export splits a folder's weight files")
    flags.DEFINE_bool("fp16", False, "read the fp16 variant of diffusers files, or write it with --export")
    flags.DEFINE_bool("raw", False, "take the trained weights of a run instead of their moving average")
    flags.DEFINE_enum("dtype", "source", choices.STORED_DTYPES, "dtype of the model folder's weights")
    flags.DEFINE_integer("num_frames", None, "frames per clip of a single file's UNet; default: from header or name", 1)
    flags.DEFINE_bool("overwrite", False, "replace an existing --dst")


def check() -> None:
    """Checks flags and paths without JAX.

    Raises:
      UserError: if a value is impossible, a file to read is missing, or the results cannot be written.
    """
    args, dst = flags.FLAGS, Path(flags.FLAGS.dst)
    parse_size(args.max_shard_size)
    single = args.export and args.what in ("comfyui", "taesdv")
    if single and dst.suffix != ".safetensors":
        raise WeightsError(f"{dst}: the name of a single file must end in .safetensors")
    if not single and dst.suffix in (".safetensors", ".ckpt", ".bin", ".pth"):
        file = "; --what comfyui writes a file" if args.export else ""
        raise WeightsError(f"--dst={dst}: this writes a folder, and the name is that of a file{file}")
    for path in (dst, dst.with_suffix(".md")) if single and args.what == "comfyui" else (dst,):
        refuse_existing(path, args.overwrite)
        if path.exists() and path.is_dir() == single:
            raise WeightsError(f"{path} is a {'folder' if single else 'file'}: choose another destination")
    check_folder(dst.parent, f"--dst={dst}")
    if not args.export and (Path(args.src) / "decoder.json").is_file() and dst.name != choices.TINY_DECODER:
        raise WeightsError(f"{args.src} trained a tiny decoder: --dst {dst} must be named {choices.TINY_DECODER}")
    commands.check_inputs(*(["base"] if args.src.startswith("hub:") else ["src", "base"]))


def main() -> None:
    check()
    print(f"reading {flags.FLAGS.src}", flush=True)
    from sfv_jax.checkpoints.decoders import export_decoder, import_decoder, is_decoder_run, pack_decoder
    from sfv_jax.checkpoints.exporter import export_model
    from sfv_jax.checkpoints.importer import ReadOptions, import_model
    from sfv_jax.training.encoders import export_encoders

    args = flags.FLAGS
    # An exception, so that partial folders are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("convert: stopped by SIGTERM"))
    variant = "fp16" if args.fp16 else None
    if args.export and args.what == "encoders":
        export_encoders(args.src, args.dst, **commands.values("base", "raw", "fp16", "overwrite"))
        report(args.dst)
    elif args.export and args.what == "taesdv":
        export_decoder(args.src, args.dst, **commands.values("raw", "fp16"))
    elif args.export and args.what == "model" and is_decoder_run(Path(args.src)):
        pack_decoder(args.src, args.dst, **commands.values("raw", "fp16", "overwrite"))
        report(args.dst)
    elif not args.export and Path(args.dst).name == choices.TINY_DECODER:
        found = import_decoder(args.src, args.dst, **commands.values("base", "raw", "allow_pickle", "overwrite"))
        print(f"{choices.TINY_DECODER:14} {found.record()['parameters']:>13,} parameters  float32")
    elif args.export:
        options = commands.values("what", "raw", "max_shard_size", "overwrite")
        export_model(args.src, args.dst, variant=variant, **options)
    else:
        options = ReadOptions(variant, **commands.values("dtype", "num_frames", "allow_pickle"))
        given = commands.values("base", "overwrite")
        for note in import_model(args.src, args.dst, options=options, verbose=True, **given):
            print(note)
        report(args.dst)
    print(f"wrote {args.dst}")


if __name__ == "__main__":
    commands.run(main, define_flags)
