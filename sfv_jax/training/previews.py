"""Sample videos during training, always from the same conditions and noise, so that steps can be compared."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import Base
from sfv_jax.data.video import write_video
from sfv_jax.models import tree
from sfv_jax.models.codec import to_pixels, to_signed
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.runtime.processes import whole
from sfv_jax.runtime.seeds import stream
from sfv_jax.runtime.sharding import on_mesh
from sfv_jax.sampling.generator import Generator
from sfv_jax.training.metrics import MetricWriter


class Pictures:
    """Writer of the pictures of a run: rows of clips, whose columns are frames.

    Args:
      workdir: the workdir of the run.
      writer: receiver of the strips.
      name: name of the strips for `writer`.
    """

    def __init__(self, workdir: Path, writer: MetricWriter, name: str):
        self.folder, self.writer, self.name = workdir / "samples", writer, name

    def draw(self, raw, ema, step: int) -> None:
        """Writes `samples/STEP.png`, a strip of all frames, also to TensorBoard, and `samples/STEP.gif`.

        All processes must call it; process 0 writes.

        Args:
          raw, ema: parameters of the trained network.
          step: number of finished steps.
        """
        clips, scores = self.clips(raw, ema)
        if jax.process_index() > 0:
            return
        if scores:
            self.writer.scalars(step, scores)
        clips = [np.asarray(x) for x in clips]
        self.folder.mkdir(exist_ok=True)
        frames = rearrange(np.stack(clips, axis=1), "b n t h w c -> t (b h) (n w) c")
        write_video(self.folder / f"{step:07d}.gif", enlarge(frames, clips[0].shape[2]))
        strip = rearrange(np.stack(clips, axis=1), "b n t h w c -> (b n h) (t w) c")
        strip = enlarge(strip[None], clips[0].shape[2])
        write_video(self.folder / f"{step:07d}.png", strip)
        self.writer.image(step, self.name, strip[0])

    def clips(self, raw, ema) -> tuple[list, dict[str, float]]:
        """Returns the clips uint8 `[n, t, h, w, 3]` of each row, and scores; only process 0 uses them."""
        raise NotImplementedError


class Previews(Pictures):
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
        super().__init__(workdir, writer, "samples/truth_raw_ema")

    def clips(self, raw, ema) -> tuple[list, dict[str, float]]:
        latents = [whole(self.generate(params, self.condition, self.noise, **self.options)) for params in (raw, ema)]
        if jax.process_index() > 0:
            return [], {}
        return [self.truth, *(self.decode(x) for x in latents)], {}


class VAEPreviews(Pictures):
    """Reconstructions of whole clips: rows are the clip, and those by the raw weights and by their moving average.

    Args:
      config: config of the run.
      vae: config of the VAE.
      source: examples with `frames`.
      workdir, writer, mesh: as for `Previews`.
    """

    def __init__(self, config: ConfigDict, vae: VAEConfig, source, workdir: Path, writer: MetricWriter, mesh):
        graph, _ = tree.abstract(TemporalVAE, vae)

        def reconstruct(params, frames):
            network = tree.build(graph, params)
            return to_pixels(network.decode(network.encode(to_signed(frames))))

        self.frames = np.stack([source[n]["frames"] for n in range(config.sample_count)])
        self.reconstruct = on_mesh(mesh, jax.jit(reconstruct))
        super().__init__(workdir, writer, "samples/truth_raw_ema")

    def clips(self, raw, ema) -> tuple[list, dict[str, float]]:
        made = {name: whole(self.reconstruct(x, self.frames)) for name, x in (("raw", raw), ("ema", ema))}
        scores = {f"heldout/psnr_{name}": psnr(np.asarray(frames), self.frames) for name, frames in made.items()}
        return [self.frames, *made.values()], scores


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of uint8 arrays of one shape, in dB; infinity if they are equal."""
    error = float(np.mean(np.square(a.astype(np.float32) - b.astype(np.float32))))
    return 10 * math.log10(255**2 / error) if error else math.inf


def enlarge(frames: np.ndarray, height: int) -> np.ndarray:
    """Repeats the pixels of `frames [t, h, w, 3]` until the videos of `height` in them are about 64 pixels high."""
    factor = max(64 // height, 1)
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
