"""Sample videos during training, always from the same conditions and noise, so that steps can be compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import Base
from sfv_jax.data.pictures import board, psnr, sheet
from sfv_jax.data.video import write_video
from sfv_jax.runtime.processes import whole
from sfv_jax.runtime.seeds import stream
from sfv_jax.runtime.sharding import on_mesh
from sfv_jax.sampling.generator import Generator
from sfv_jax.training.metrics import MetricWriter

ROWS = ("real", "raw weights", "average")  # of each condition


class Previews:
    """Videos that parameters of a run make, below the real ones.

    Every condition has three rows: the real video, that of the raw weights, and that of their moving average. Columns
    are frames.

    Args:
      truth: real videos uint8 `[n, t, h, w, 3]`.
      make: function from parameters to such videos. All processes call it; its result must be whole on each.
      workdir: the workdir of the run.
      writer: receiver of the strips.
      copies: whether the videos should equal the real ones; their PSNR is then written as `heldout/psnr`.
    """

    def __init__(
        self,
        truth: np.ndarray,
        make: Callable[[Any], np.ndarray],
        workdir: Path,
        writer: MetricWriter,
        *,
        copies: bool = False,
    ):
        self.truth, self.make, self.copies = truth, make, copies
        self.folder, self.writer = workdir / "samples", writer

    def draw(self, raw, ema, step: int) -> None:
        """Writes `samples/STEP.png`, a strip of all frames, also to TensorBoard, and `samples/STEP.gif`.

        All processes must call it; process 0 writes.

        Args:
          raw, ema: parameters of the trained network.
          step: number of finished steps.
        """
        clips = [self.truth, *(self.make(params) for params in (raw, ema))]
        if jax.process_index() > 0:
            return
        if self.copies:
            names = ("heldout/psnr_raw", "heldout/psnr")
            self.writer.scalars(step, {k: psnr(x, self.truth) for k, x in zip(names, clips[1:], strict=True)})
        self.folder.mkdir(exist_ok=True)
        write_video(self.folder / f"{step:07d}.gif", board([*zip(ROWS, clips, strict=True)]))
        rows = [(name, clip[n]) for n in range(len(clips[0])) for name, clip in zip(ROWS, clips, strict=True)]
        strip = sheet(rows, len(ROWS))
        write_video(self.folder / f"{step:07d}.png", strip[None])
        self.writer.image(step, "samples/truth_raw_ema", strip)


def unet_previews(
    config: ConfigDict, base: Base, source, workdir: Path, writer: MetricWriter, mesh: jax.sharding.Mesh
) -> Previews:
    """Returns samples for the first `config.sample_count` examples of a source.

    Args:
      config: config of the run.
      base: the base model, for its UNet config and codec.
      source: random access examples, such as `data.loader.WorldSource`.
      workdir, writer: as for `Previews`.
      mesh: mesh of the run.
    """
    batch = stacked(source, config.sample_count)
    condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
    generate = on_mesh(mesh, Generator(base.unet))
    decode: Callable = base.codec.decode
    first, steps = jax.random.split(stream(config.seed, "previews"))
    noise = np.asarray(jax.random.normal(first, batch["latents"].shape))
    own = config[config.method]
    options: dict[str, Any] = dict(steps=own.get("sample_steps", 1), sampler=own.get("sampler", "euler"))
    options["keys"] = jax.random.split(steps, len(noise))

    def make(params) -> np.ndarray:
        return np.asarray(decode(whole(generate(params, condition, noise, **options))))

    return Previews(np.asarray(decode(batch["latents"])), make, workdir, writer)


def stacked(source, count: int) -> dict[str, np.ndarray]:
    """Returns the first `count` examples of a source as one batch, or all if there are fewer."""
    examples = [source[n] for n in range(min(count, len(source)))]
    return {k: np.stack([e[k] for e in examples]) for k in examples[0]}
