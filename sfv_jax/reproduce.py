"""Tables 1, 2 and 3 of the paper: trains what is missing, samples, scores, prints.

    python -m sfv_jax.reproduce --fast --workdir runs/reproduce
    python -m sfv_jax.reproduce --seeds 0,1,2 --workdir runs/reproduce
    python -m sfv_jax.reproduce --scale svd --svd models/svd --data data/latents --real ucf101/ --i3d i3d.pt --dry_run
    python -m sfv_jax.reproduce --scale svd ... --set mesh.fsdp=8 --set steps=20000

`--scale world`, the default, has tiny networks and the procedural world; `--fast` less training. `--scale svd` is the
published configuration on a model folder, a latent cache and, to score with FVD, a folder of real videos whose first
frames are the conditions. What a run will cost is printed first; `--dry_run` stops there. Every stage is kept: trained
models are ordinary workdirs, samples and scores files, so the same command continues after an interruption, and
changes nothing when all is there. `index.html` in the workdir shows tables, clips side by side and training curves.
"""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags

from sfv_jax import choices
from sfv_jax.runtime import commands

FLAGS = flags.FLAGS


def main() -> None:
    from sfv_jax.reproduction import experiments
    from sfv_jax.reproduction.experiments import BASE, FAST, FULL, TABLES
    from sfv_jax.reproduction.jobs import default_jobs, ensure_run, reproduce, side_by_side
    from sfv_jax.reproduction.rows import svd_bench, world_bench
    from sfv_jax.reproduction.runs import ReproduceError, plan, svd_runs, world_runs
    from sfv_jax.runtime import compilation

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    tables, began, workdir = FLAGS.only, time.monotonic(), Path(FLAGS.workdir)
    unknown = [name for name in tables if name not in TABLES]
    if unknown or not FLAGS.seeds:
        raise ReproduceError(f"--only={','.join(unknown)}: choose from {', '.join(TABLES)}; --seeds: one or more")
    seeds = [int(seed) for seed in FLAGS.seeds]
    if FLAGS.share and not re.fullmatch(r"\d+/[1-9]\d*", FLAGS.share):
        raise ReproduceError(f"--share={FLAGS.share}: write K/N, such as 0/2 for every second run from the first")
    budget = FAST if FLAGS.fast else FULL
    if FLAGS.scale == "world":
        runs = world_runs(workdir / ("fast" if FLAGS.fast else "full"), budget, FLAGS.set)
    elif FLAGS.svd and FLAGS.data:
        runs = svd_runs(workdir / "svd", FLAGS.svd, FLAGS.data, FLAGS.set)
    else:
        raise ReproduceError("--scale svd needs --svd MODEL and --data CACHE")
    methods = [(run, seed) for seed in seeds for run in experiments.runs_of(tables)]
    todo = methods + [(BASE, seed) for seed in seeds]  # of the base model only the rows
    jobs = min(FLAGS.jobs or default_jobs(FLAGS.scale), len(methods))
    if not FLAGS.share:
        print("\n".join(plan(runs, tables, seeds, jobs)), flush=True)
    if FLAGS.dry_run:
        return
    if FLAGS.scale == "world":
        bench = world_bench(workdir, runs, budget)
    else:
        bench = svd_bench(runs, FLAGS.real, FLAGS.i3d, (FLAGS.height, FLAGS.width), FLAGS.batch_size)
    if FLAGS.share:
        first, of = map(int, FLAGS.share.split("/"))
        if first and runs.trains_base and not runs.done(BASE, 0):
            raise ReproduceError(f"--share={FLAGS.share}: {runs.base} is not trained yet; --share=0/{of} does it first")
        runs.ensure(BASE, 0)
        for run, seed in todo[first::of]:
            ensure_run(bench, run, tables, seed)
        return
    if jobs > 1 and not all(runs.done(run, seed) for run, seed in methods):
        with ThreadPoolExecutor(1) as beside:
            scored = beside.submit(bench.score, bench.truth)  # trains what scores: all jobs would at once
            runs.ensure(BASE, 0)
        scored.result()
        print(f"{len(methods)} runs, {jobs} at a time: see {runs.folder}/job*.log", flush=True)
        side_by_side(sys.argv[1:], runs.folder, jobs)
    reproduce(bench, tables, seeds)
    print("\n" + (bench.runs.folder / "scores.md").read_text())
    minutes = (time.monotonic() - began) / 60
    print(f"Look at {bench.runs.folder / 'index.html'} and strips.png. {minutes:.1f} minutes this time.")


def define_flags() -> None:
    flags.DEFINE_string("workdir", "runs/reproduce", "folder for everything that is made")
    flags.DEFINE_enum("scale", "world", ["world", "svd"], "tiny networks in the procedural world, or SVD itself")
    flags.DEFINE_bool("fast", False, "world: rougher tables, less training")
    flags.DEFINE_list("only", ["table1", "table2", "table3"], f"which tables: {', '.join(choices.TABLES)}")
    flags.DEFINE_list("seeds", ["0"], "of training (the base model has one) and of the samples")
    flags.DEFINE_bool("dry_run", False, "print the plan and its cost, and stop")
    flags.DEFINE_string("svd", None, "svd: model folder")
    flags.DEFINE_string("data", None, "svd: latent cache to train on")
    flags.DEFINE_string("real", None, "svd: folder of real videos; their first frames are the conditions")
    flags.DEFINE_string("i3d", None, "svd: I3D weights for FVD")
    flags.DEFINE_integer("height", 576, "svd: of the videos sampled, multiples of 64")
    flags.DEFINE_integer("width", 1024, "svd: of the videos sampled, multiples of 64")
    flags.DEFINE_integer("batch_size", 8, "svd: videos sampled at a time", lower_bound=1)
    flags.DEFINE_integer(
        "jobs", None, "runs at a time; default: in the world on CPU one per core, at most 4", lower_bound=1
    )
    flags.DEFINE_string("share", None, "K/N: only every Nth run, from run K, and no tables: what --jobs starts")
    flags.DEFINE_multi_string("set", [], "config field of every training run, such as mesh.fsdp=8; may be repeated")
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)
