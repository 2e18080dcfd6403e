"""Trains a model.

    python -m sfv_jax.train --config configs/sfv.py --workdir runs/sfv --config.init=models/svd --config.data.path=cache

After an interruption, the same command continues the run. `--workdir` receives `config.json`, `checkpoints/`,
`metrics.jsonl`, `tensorboard/` and `samples/`. `--config.FIELD=VALUE` sets any field; see sfv_jax/config.py.

Several processes (hosts) run the same command with `--coordinator=HOST:PORT --num_processes=N --process_id=I`; SLURM
and TPU pods need no flags; launch/ contains scripts. The workdir must be on a disk that all processes share.
"""

import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sfv_jax.config_check import check, check_paths
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_folder

FLAGS = flags.FLAGS


def main() -> None:
    check_folder(Path(FLAGS.workdir), f"--workdir={FLAGS.workdir}")
    check(FLAGS.config)
    check_paths(FLAGS.config)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # before JAX starts
    from sfv_jax.runtime import compilation, processes
    from sfv_jax.training.loop import train

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    processes.join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    train(FLAGS.config, Path(FLAGS.workdir))


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file, such as configs/sfv.py; some take a word: configs/sfv.py:tiny trains in a procedural world",
        lock_config=True,
    )
    flags.DEFINE_string("workdir", None, "folder of the run, created if absent")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto to let JAX find it")
    flags.DEFINE_integer("num_processes", None, "number of processes of the run, with --coordinator", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0, with --coordinator", lower_bound=0)
    flags.mark_flags_as_required(["config", "workdir"])
    commands.refuse_empty("workdir")
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)
