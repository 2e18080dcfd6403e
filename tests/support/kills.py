"""Kills runs with SIGKILL at random moments, continues them, and compares the results with an undisturbed run.

    python -m tests.support.kills --kills 100
    python -m tests.support.kills --kills 100 --what prepare

Every second kill waits for a half-written checkpoint (or shard); the others happen at a random time after some
progress. `train` must end with the same arrays and metrics, bit for bit; `prepare` with the same files.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from etils import epath

ROOT = Path(__file__).parents[2]
COMMITTED = "commit_success.txt"  # the last file that orbax writes
TINY = dict(
    steps=100,
    log_every=1,
    checkpoint_every=4,
    sample_every=0,
    batch_size=2,
    **{
        "data.world_size": 16,
        "unet.block_out_channels": (8,),
        "unet.num_attention_heads": (1,),
        "unet.norm_groups": 4,
    },
)


@dataclass
class Outcome:
    """Number of kills that a command survived, number `inside` a write, and number of runs."""

    kills: int = 0
    inside: int = 0
    runs: int = 0


def train_command(workdir: Path, method: str = "sfv", **changes) -> list[str]:
    """Returns the command of a run of the smallest network with a checkpoint every fourth step."""
    fields = [f"--config.{k}={v}" for k, v in (TINY | changes).items()]
    config = ROOT / "configs" / f"{method}.py"
    return [sys.executable, "-m", "sfv_jax.train", f"--config={config}:tiny", f"--workdir={workdir}", *fields]


def half_written_checkpoints(workdir: Path) -> bool:
    """Returns whether a checkpoint is incomplete."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(not (p / COMMITTED).exists() for p in folder.iterdir())


def checkpoints(workdir: Path) -> int:
    """Returns the step of the newest complete checkpoint."""
    folder = workdir / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max((s for s in steps if (folder / str(s) / COMMITTED).exists()), default=0)


def half_written_shards(out: Path) -> bool:
    """Returns whether a shard is incomplete."""
    return any(out.glob(".*.tmp"))


def shards(out: Path) -> int:
    """Returns the number of finished shards."""
    return len(list(out.glob("progress/*.json")))


def torment(
    command: list[str],
    folder: Path,
    kills: int,
    rng: random.Random,
    progress: Callable[[Path], int],
    half_written: Callable[[Path], bool],
    environment: dict[str, str],
    before: int = 0,
) -> Outcome:
    """Runs `command` until it ends by itself, killing and restarting it up to `kills` times, with `before` others."""
    outcome = Outcome(runs=1)
    while True:
        log = (folder.parent / f"{folder.name}.log").open("ab")
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        turn = before + outcome.kills
        if turn < kills and _wait_to_strike(process, folder, turn, rng, progress, half_written):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome.kills += 1
            outcome.inside += half_written(folder)
            print(f"{folder.name}: kill {outcome.kills}, {outcome.inside} inside a write", flush=True)
            continue
        if process.wait():
            tail = (folder.parent / f"{folder.name}.log").read_text()[-3000:]
            raise RuntimeError(f"ended with {process.returncode} after {outcome.kills} kills:\n{tail}")
        return outcome


def _wait_to_strike(process, folder: Path, turn: int, rng: random.Random, progress: Callable, half_written: Callable):
    """Waits for the moment of the next kill; returns False if the process ends first."""
    begun = progress(folder)
    strike = None
    while process.poll() is None:
        if strike is None and progress(folder) > begun:
            strike = time.monotonic() + rng.uniform(0, 0.5)
        if strike and time.monotonic() > strike and (turn % 2 == 0 or _stopped_inside(process, folder, half_written)):
            return True
        time.sleep(0.0005)
    return False


def _stopped_inside(process, folder: Path, half_written: Callable[[Path], bool]) -> bool:
    """Returns whether the process was stopped inside a write; it may end the write between the look and the signal."""
    if not half_written(folder):
        return False
    os.killpg(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if half_written(folder):
        return True
    os.killpg(process.pid, signal.SIGCONT)
    return False


def environment(cache: Path) -> dict[str, str]:
    """Returns this process's environment with a compilation cache and few optimizations, for quick restarts."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "",
    }


def kill_train(folder: Path, kills: int, seed: int = 0, **changes) -> Outcome:
    """Kills training runs `kills` times in total; raises AssertionError if one differs from the undisturbed run."""
    rng, outcome, env = random.Random(seed), Outcome(), environment(folder / "compiled")
    subprocess.run(train_command(folder / "whole", **changes), cwd=ROOT, env=env, check=True, capture_output=True)
    expected = final_arrays(folder / "whole"), numbers(folder / "whole")
    while outcome.kills < kills:
        workdir = folder / f"run{outcome.runs}"
        command = train_command(workdir, **changes)
        done = torment(command, workdir, kills, rng, checkpoints, half_written_checkpoints, env, outcome.kills)
        found = final_arrays(workdir), numbers(workdir)
        assert found[0].keys() == expected[0].keys()
        different = [name for name, x in found[0].items() if not np.array_equal(x, expected[0][name], equal_nan=True)]
        assert not different, f"{workdir}: {len(different)} arrays differ, first {different[0]}"
        assert found[1] == expected[1], f"{workdir}/metrics.jsonl differs"
        assert not (workdir / "damaged").exists(), f"{workdir}: a whole checkpoint was found damaged"
        outcome = _add(outcome, done)
    return outcome


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of the newest checkpoint by path."""
    path = epath.Path(workdir.resolve()) / "checkpoints" / str(checkpoints(workdir)) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_flatten_with_path(tree)[0]}


def numbers(workdir: Path) -> list[dict]:
    """Returns the metrics of every step without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "speed/", "memory/"))} for line in lines]


def kill_prepare(folder: Path, kills: int, videos: Path, svd: Path, seed: int = 0, **settings) -> Outcome:
    """Kills `prepare` in the same way; raises AssertionError if a cache differs in any byte."""
    rng, outcome, env = random.Random(seed), Outcome(), environment(folder / "compiled")
    fields = [f"--{k}={v}" for k, v in settings.items()]
    command = [sys.executable, "-m", "sfv_jax.prepare", f"--videos={videos}", f"--svd={svd}", *fields]
    subprocess.run([*command, f"--out={folder / 'whole'}"], cwd=ROOT, env=env, check=True, capture_output=True)
    expected = contents(folder / "whole")
    while outcome.kills < kills:
        out = folder / f"run{outcome.runs}"
        out.mkdir()
        done = torment([*command, f"--out={out}"], out, kills, rng, shards, half_written_shards, env, outcome.kills)
        found = contents(out)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert all(found[k] == expected[k] for k in found), [k for k in found if found[k] != expected[k]]
        outcome = _add(outcome, done)
    return outcome


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _add(a: Outcome, b: Outcome) -> Outcome:
    return Outcome(a.kills + b.kills, a.inside + b.inside, a.runs + b.runs)


def make_inputs(folder: Path, clips: int) -> tuple[Path, Path]:
    """Writes `clips` short videos of the procedural world and two tiny random encoders; returns both folders."""
    from sfv_jax.data.video import write_video
    from sfv_jax.data.worlds import World
    from tests.support.small_cache import write_encoders

    for index in range(clips):
        write_video(folder / "videos" / f"{index:03d}.mp4", World(size=48, num_frames=8).clip(index)[0])
    return folder / "videos", write_encoders(folder / "svd")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if flags.FLAGS.what == "train":
            outcome = kill_train(folder, flags.FLAGS.kills, flags.FLAGS.seed)
        else:
            videos, svd = make_inputs(folder, clips=20)
            outcome = kill_prepare(
                folder, flags.FLAGS.kills, videos, svd, flags.FLAGS.seed,
                height=32, width=48, num_frames=4, shard_size=1,
            )  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    print(
        f"{flags.FLAGS.what}: {outcome.kills} kills, {outcome.inside} inside a write, over {outcome.runs} runs: "
        f"all equal to the undisturbed run ({minutes:.1f} min)"
    )


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 100, "number of kills")
    flags.DEFINE_enum("what", "train", ["train", "prepare"], "command to kill")
    flags.DEFINE_integer("seed", 0, "seed of the moments")
    app.run(main)
