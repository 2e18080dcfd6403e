"""Sample videos during training, always from the same conditions and noise, so that steps can be compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import Base
from sfv_jax.data.video import write_video
from sfv_jax.runtime.processes import whole
from sfv_jax.runtime.seeds import stream
from sfv_jax.runtime.sharding import on_mesh
from sfv_jax.sampling.generator import Generator
from sfv_jax.training.metrics import MetricWriter


class Previews:
    """Samples for the first `config.sample_count` examples of a source.

    Every condition has three rows: the real video, a sample of the raw weights, and one of their moving average.
    Columns are frames.

    Args:
      config: config of the run.
      base: the base model, for its UNet config and codec.
      source: random access examples, such as `data.loader.WorldSource`.
      workdir: the workdir of the run.
      writer: receiver of the strips.
      mesh: mesh of the run.
    """

    def __init__(
        self, config: ConfigDict, base: Base, source, workdir: Path, writer: MetricWriter, mesh: jax.sharding.Mesh
    ):
        examples = [source[n] for n in range(min(config.sample_count, len(source)))]
        batch: dict[str, Any] = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
        self.condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
        self.decode: Callable = base.codec.decode
        self.generate = on_mesh(mesh, Generator(base.unet))
        noise, steps = jax.random.split(stream(config.seed, "previews"))
        self.noise = np.asarray(jax.random.normal(noise, batch["latents"].shape))
        own = config[config.method]
        self.options = dict(steps=own.get("sample_steps", 1), sampler=own.get("sampler", "euler"))
        self.options["keys"] = jax.random.split(steps, len(examples))
        self.truth = np.asarray(self.decode(batch["latents"]))
        self.folder, self.writer = workdir / "samples", writer

    def draw(self, raw, ema, step: int) -> None:
        """Writes `samples/STEP.png`, a strip of all frames, also to TensorBoard, and `samples/STEP.gif`.

        All processes must call it; process 0 writes.

        Args:
          raw, ema: parameters of the UNet.
          step: number of finished steps.
        """
        latents = [whole(self.generate(params, self.condition, self.noise, **self.options)) for params in (raw, ema)]
        if jax.process_index() > 0:
            return
        clips = [self.truth, *(np.asarray(self.decode(x)) for x in latents)]
        self.folder.mkdir(exist_ok=True)
        frames = rearrange(np.stack(clips, axis=1), "b n t h w c -> t (b h) (n w) c")
        write_video(self.folder / f"{step:07d}.gif", enlarge(frames, clips[0].shape[2]))
        strip = rearrange(np.stack(clips, axis=1), "b n t h w c -> (b n h) (t w) c")
        strip = enlarge(strip[None], clips[0].shape[2])
        write_video(self.folder / f"{step:07d}.png", strip)
        self.writer.image(step, "samples/truth_raw_ema", strip[0])


def enlarge(frames: np.ndarray, height: int) -> np.ndarray:
    """Repeats the pixels of `frames [t, h, w, 3]` until the videos of `height` in them are about 64 pixels high."""
    factor = max(64 // height, 1)
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
