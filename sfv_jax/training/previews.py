"""Samples drawn while training: always from the same conditions and noise, so that strips of two steps compare."""

from pathlib import Path

import jax
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import Base
from sfv_jax.data.video import write_video
from sfv_jax.runtime.processes import whole
from sfv_jax.runtime.sharding import on_mesh
from sfv_jax.sampling.generator import Generator
from sfv_jax.training.metrics import MetricWriter


class Pictures:
    """Samples from the first `config.sample_count` examples of a source.

    Every condition has three rows: the truth, the raw weights and their moving average. Columns are frames.
    """

    def __init__(
        self, config: ConfigDict, base: Base, source, workdir: Path, writer: MetricWriter, mesh: jax.sharding.Mesh
    ):
        examples = [source[n] for n in range(min(config.sample_count, len(source)))]
        batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
        self.condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
        self.codec = base.codec
        self.generate = on_mesh(mesh, Generator(base.unet))
        key = jax.random.key(config.seed)
        self.noise = np.asarray(jax.random.normal(key, batch["latents"].shape))
        own = config[config.method]
        self.how = dict(steps=own.get("sample_steps", 1), sampler=own.get("sampler", "euler"))
        self.how["keys"] = jax.random.split(jax.random.fold_in(key, 1), len(examples))
        self.truth = np.asarray(base.codec.decode(batch["latents"]))
        self.folder, self.writer = workdir / "samples", writer

    def draw(self, raw, ema, step: int) -> None:
        """Writes `samples/STEP.png` (a strip of all frames; also to TensorBoard) and `.gif` (truth, raw, average).

        Every process takes part in computing; process 0 writes.
        """
        latents = [whole(self.generate(params, self.condition, self.noise, **self.how)) for params in (raw, ema)]
        if jax.process_index() > 0:
            return
        clips = [self.truth, *(np.asarray(self.codec.decode(x)) for x in latents)]
        self.folder.mkdir(exist_ok=True)
        frames = rearrange(np.stack(clips, axis=1), "b n t h w c -> t (b h) (n w) c")
        write_video(self.folder / f"{step:07d}.gif", enlarge(frames, clips[0].shape[2]))
        strip = rearrange(np.stack(clips, axis=1), "b n t h w c -> (b n h) (t w) c")
        strip = enlarge(strip[None], clips[0].shape[2])
        write_video(self.folder / f"{step:07d}.png", strip)
        self.writer.image(step, "samples/truth_raw_ema", strip[0])


def enlarge(frames: np.ndarray, height: int) -> np.ndarray:
    """`[t, h, w, 3]` with every pixel repeated until pictures of `height` within are 64 pixels high, if smaller."""
    factor = max(64 // height, 1)
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
