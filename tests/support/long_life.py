"""Memory of a process over a long life: of a training run of many steps, and of a sampler that meets many shapes.

    python -m tests.support.long_life --what train --count 20000
    python -m tests.support.long_life --what shapes --count 300

Prints resident memory and the number of memory maps (Linux allows a process 65,530) at twenty times. Both should level
off: steps keep nothing, and the sampler keeps the programs of `MOST_KINDS` shapes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from sfv_jax import config as configs
from sfv_jax.models import tree
from sfv_jax.models.unet import UNet
from sfv_jax.sampling.sampler import MOST_KINDS, Sampler
from sfv_jax.training import journal, loop
from tests.support import small_run


def memory() -> tuple[float, int]:
    """Returns the resident memory of this process in MB, and its number of memory maps."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(Path("/proc/self/maps").read_text().splitlines())


def watch(what: str, count: int) -> Callable[[int], None]:
    """Returns a function of the number done so far, which prints a line at twenty times."""
    began = time.monotonic()
    print(f"| {what} | MB | maps | seconds |\n| ---: | ---: | ---: | ---: |", flush=True)

    def at(done: int) -> None:
        if done % max(count // 20, 1) == 0:
            resident, maps = memory()
            print(f"| {done} | {resident:.0f} | {maps} | {time.monotonic() - began:.0f} |", flush=True)

    return at


def train(count: int) -> None:
    """Trains a tiny run of `count` steps with checkpoints and pictures now and then."""
    config = small_run.get_config().unlock()
    config.update(dict(steps=count, log_every=50, checkpoint_every=2000, keep_checkpoints=2, sample_every=2000))
    at, end, steps = watch("step", count), journal.Journal.end_interval, iter(range(50, count + 1, 50))

    def end_interval(self) -> None:
        end(self)
        at(next(steps))

    journal.Journal.end_interval = end_interval
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config.lock(), Path(folder) / "run")


def shapes(count: int) -> None:
    """Samples videos of 1 to `count` frames."""
    config = small_run.get_config()
    unet, codec = configs.unet_of(config), configs.patch_codec_of(config)
    sampler, at = Sampler(unet, tree.init(UNet, unet, 0), codec), watch("shapes", count)
    image = np.zeros((16, 16, 3), np.uint8)
    print(f"programs of {MOST_KINDS} shapes are kept")
    for n in range(count):
        sampler([image], num_frames=1 + n)
        at(n + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("train", "shapes"), required=True)
    parser.add_argument("--count", type=int, required=True)
    args = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_compilation_cache", False)
    {"train": train, "shapes": shapes}[args.what](args.count)


if __name__ == "__main__":
    main()
