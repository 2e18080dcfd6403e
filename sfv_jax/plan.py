"""What a job would cost, before anything is rented.

    python -m sfv_jax.plan --config configs/sfv.py --target v5e:4x8 --config.mesh.fsdp=32
    python -m sfv_jax.plan --config configs/sfv.py --target h200:8 --what sample --json plan.json --picture plan.png

Compiles the real programs (the train step of a config; the stages of sampling or of preparing a cache) for accelerators
that need not be there, and prints memory, FLOPs, collectives and a lower bound of the time. `--fit` looks for settings
that make a job fit. Needs `pip install 'sfv_jax[plan-tpu]'` or `[plan-gpu]`; `--target cpu:N` needs nothing.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sfv_jax import config as configs
from sfv_jax.config import ConfigError
from sfv_jax.models.networks import DTYPES
from sfv_jax.performance import plan_report, targets
from sfv_jax.performance.job import DECODING, QUICK, WHAT, PlanError, fit, plan
from sfv_jax.performance.targets import TargetError
from sfv_jax.runtime import compilation
from sfv_jax.runtime.files import replacing
from sfv_jax.weights.folders import WeightsError

FLAGS = flags.FLAGS


def write(result: dict) -> None:
    """The files that were asked for."""
    if FLAGS.json:
        with replacing(Path(FLAGS.json)) as temporary:
            temporary.write_text(json.dumps(result, indent=1))
    if FLAGS.picture:
        plan_report.picture(result, Path(FLAGS.picture))


def main(_):
    logging.set_verbosity(logging.WARNING)
    try:
        if FLAGS.what not in WHAT:
            raise PlanError(f"--what={FLAGS.what}: choose one of {', '.join(WHAT)}")
        for name in ("dtype", "vae_dtype"):
            if FLAGS[name].value not in DTYPES:
                raise PlanError(f"--{name}={FLAGS[name].value}: choose one of {', '.join(DTYPES)}")
        if not 0 < FLAGS.efficiency <= 1:
            raise PlanError(f"--efficiency={FLAGS.efficiency}: a share above 0, at most 1")
        target = targets.parse(FLAGS.target)
        targets.prepare(target)
        compilation.set_up(runs=False)
        if FLAGS.compile_effort is None and target.chip.platform == "tpu":
            jax.config.update("jax_exec_time_optimization_effort", QUICK)
        size = (FLAGS.height or WHAT[FLAGS.what][0], FLAGS.width or WHAT[FLAGS.what][1])
        names = ("batch_size", "memory_gib", "efficiency", "steps", "dtype", "vae_dtype", *DECODING)
        options = {name: FLAGS[name].value for name in names} | {"hlo": Path(FLAGS.hlo) if FLAGS.hlo else None}
        result = plan(FLAGS.config, target, FLAGS.what, size, options, say=lambda text: print(text, file=sys.stderr))
        write(result)
        print(plan_report.text(result))
        if FLAGS.fit and not result["fits"]:
            print("settings that may make it fit, each on top of those before:")
            if found := fit(FLAGS.config, target, FLAGS.what, size, options, say=lambda text: print(text, flush=True)):
                write(result := found)
                print(plan_report.text(found))
            else:
                print("none of these settings makes it fit")
    except (ConfigError, PlanError, TargetError, WeightsError) as error:
        sys.exit(f"plan: {error}")
    sys.exit(0 if result["fits"] else 1)


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "configs/X.py or configs/X.py:tiny", lock_config=True)
    flags.DEFINE_string("target", None, targets.known())
    flags.DEFINE_string("what", "train", "train, sample or prepare")
    flags.DEFINE_bool("fit", False, "when it does not fit, try settings that may make it fit")
    flags.DEFINE_string("json", None, "file for the plan as JSON")
    flags.DEFINE_string("picture", None, "file for a picture of the memory (.png)")
    flags.DEFINE_string("hlo", None, "folder for the text of the compiled programs")
    flags.DEFINE_integer("height", None, "pixels; default 448 (train, prepare), 576 (sample)", lower_bound=1)
    flags.DEFINE_integer("width", None, "pixels; default 768 (train, prepare), 1024 (sample)", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "sample, prepare: videos at a time; default one per chip", lower_bound=1)
    flags.DEFINE_integer("steps", 1, "sample: calls of the UNet", lower_bound=1)
    flags.DEFINE_string("dtype", "bfloat16", "sample: dtype of the UNet")
    flags.DEFINE_string("vae_dtype", "bfloat16", "sample: compute dtype of the VAE's decoder")
    flags.DEFINE_integer("decode_chunk_size", None, "sample: frames decoded at a time", lower_bound=1)
    flags.DEFINE_integer("decode_pixels", None, "sample: pixels decoded at a time on a device; 0: all", lower_bound=0)
    flags.DEFINE_float("memory_gib", None, "memory of a chip, instead of the target's", lower_bound=0)
    flags.DEFINE_float("efficiency", 0.6, "share of the lower bound's speed that a run is assumed to reach")
    flags.mark_flags_as_required(["config", "target"])
    compilation.define_flags()


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=configs.parse_flags)
