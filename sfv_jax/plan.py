"""Plans a job: its memory, FLOPs and time on accelerators that need not be there.

    python -m sfv_jax.plan --config configs/sfv.py --target v5e:4x8 --config.mesh.fsdp=32
    python -m sfv_jax.plan --config configs/sfv.py --target h200:8 --what sample --json plan.json --picture plan.png

Compiles the real programs (the train step of a config; the stages of sampling or of preparing a cache) for the target
and prints memory, FLOPs, collectives and a lower bound of the time. `--fit` searches for settings with which the job
fits. Needs `pip install -e '.[plan-tpu]'` or `[plan-gpu]`; `--target cpu:N` needs neither.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sfv_jax import choices
from sfv_jax.errors import UserError
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_file, check_folder

FLAGS = flags.FLAGS


def write(result: dict) -> None:
    """Writes the files of `--json` and `--picture`."""
    from sfv_jax.performance import plan_report
    from sfv_jax.runtime.files import write_json

    if FLAGS.json:
        write_json(Path(FLAGS.json), result)
    if FLAGS.picture:
        plan_report.picture(result, Path(FLAGS.picture))


def check() -> None:
    """Checks flags and paths without JAX.

    Raises:
      UserError: if a value is impossible, or a file cannot be written.
    """
    commands.check_decoder(("wide",))
    if not 0 < FLAGS.efficiency <= 1:
        raise UserError(f"--efficiency={FLAGS.efficiency}: give a fraction above 0 and at most 1")
    for name in ("json", "picture"):
        if value := FLAGS[name].value:
            check_file(Path(value), f"--{name}={value}")
    if FLAGS.picture and not FLAGS.picture.lower().endswith(".png"):
        raise UserError(f"--picture={FLAGS.picture}: name a .png file")
    if FLAGS.hlo:
        check_folder(Path(FLAGS.hlo), f"--hlo={FLAGS.hlo}")


def main() -> int:
    commands.apply_size()
    check()
    from sfv_jax.performance import plan_report, targets
    from sfv_jax.performance.job import QUICK, Request, fit, plan, size_of
    from sfv_jax.performance.programs import SampleOptions
    from sfv_jax.runtime import compilation

    target = targets.parse(FLAGS.target)
    targets.prepare(target)
    effort = FLAGS.compile_effort
    if effort is None and target.chip.platform == "tpu":
        effort = QUICK
    compilation.set_up(effort, FLAGS.compile_memory_effort, runs=False)
    height, width = size_of(FLAGS.config, FLAGS.what)
    size = (FLAGS.height or height, FLAGS.width or width)
    request = Request(
        FLAGS.what,
        size,
        sampling=SampleOptions(**commands.values("steps", "dtype", "vae_dtype", "decode_chunk_size", "decode_pixels")),
        hlo=Path(FLAGS.hlo) if FLAGS.hlo else None,
        **commands.values("batch_size", "memory_gib", "efficiency", "decoder"),
    )
    result = plan(FLAGS.config, target, request, say=lambda text: print(text, file=sys.stderr))
    write(result)
    print(plan_report.text(result))
    if FLAGS.fit and not result["fits"]:
        print("settings that may make it fit, each on top of those before:")
        if found := fit(FLAGS.config, target, request, say=lambda text: print(text, flush=True)):
            write(result := found)
            print(plan_report.text(found))
        else:
            print("none of these settings makes it fit")
    return 0 if result["fits"] else 1


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "config file, configs/X.py or configs/X.py:tiny", lock_config=True)
    flags.DEFINE_string(
        "target", None, "chips to compile for, such as v5e:4x8, h200:8, cpu:2; an unknown name lists them all"
    )
    flags.DEFINE_enum("what", "train", choices.JOBS, "job whose programs are compiled")
    flags.DEFINE_bool("fit", False, "if the job does not fit, try settings with which it may fit")
    flags.DEFINE_string("json", None, "file for the plan as JSON")
    flags.DEFINE_string("picture", None, "file for a picture of the memory (.png)")
    flags.DEFINE_string("hlo", None, "folder for the text of the compiled programs")
    commands.define_pixels("height", None, "height in pixels; default: of the world or cache, else 448, for sample 576")
    commands.define_pixels("width", None, "width in pixels; default: of the world or cache, else 768, for sample 1024")
    commands.define_size()
    flags.DEFINE_integer("batch_size", None, "sample, prepare: videos per batch; default one per chip", lower_bound=1)
    flags.DEFINE_integer("steps", 1, "sample: calls of the UNet", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", choices.DTYPES, "sample: dtype of the UNet")
    flags.DEFINE_enum("vae_dtype", "bfloat16", choices.DTYPES, "sample: compute dtype of the decoder")
    commands.define_decoder("; wide, and tiny without one: a decoder of this size")
    flags.DEFINE_integer("decode_chunk_size", None, "sample: frames decoded at a time", lower_bound=1)
    flags.DEFINE_integer("decode_pixels", None, "sample: pixels decoded at a time on a device; 0: all", lower_bound=0)
    flags.DEFINE_float("memory_gib", None, "memory of a chip in GiB; default the target's", lower_bound=1e-3)
    flags.DEFINE_float("efficiency", 0.6, "assumed speed of a run as a fraction of the lower bound's")
    flags.mark_flags_as_required(["config", "target"])
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)
