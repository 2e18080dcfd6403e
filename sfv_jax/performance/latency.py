"""Time and FLOPs of each stage of sampling, with compilation reported separately.

stages = measure(sampler, image, Video(steps=1))
columns, rows, notes = table(stages)  # for evaluation.report.Report.table
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.performance.timing import Timing, warm
from sfv_jax.runtime.device import count_flops, peak_flops, peak_memory
from sfv_jax.runtime.sharding import on_mesh

if TYPE_CHECKING:
    from sfv_jax.sampling.sampler import Sampler

STAGES = {
    "clip": "image embedding by the CLIP tower",
    "encode": "conditioning latent by the VAE's encoder",
    "unet": "all calls of the UNet, from noise to latents: the time in the SF-V paper",
    "decode": "frames by the VAE's decoder, or a tiny one",
    "end to end": "image to frames in host memory",
}


@dataclass(frozen=True)
class Stage:
    """Stage of sampling and its timing.

    Attributes:
      name: a key of `STAGES`.
      timing: of one call.
      flops: matrix products and convolutions of a call on all devices, a multiply-add as two; None if not counted.
      peak: FLOP/s of all devices by their data sheet; None if unknown.
    """

    name: str
    timing: Timing
    flops: float | None = None
    peak: float | None = None

    @property
    def tflops(self) -> float | None:
        """TFLOP/s of a warm call; None if FLOPs were not counted."""
        return self.flops / self.timing.median / 1e12 if self.flops else None

    @property
    def mfu(self) -> float | None:
        """Fraction of the peak FLOP/s in a warm call; None if either is unknown."""
        return self.flops / self.timing.median / self.peak if self.flops and self.peak else None


@dataclass(frozen=True)
class Video:
    """Video whose stages are timed. The fields are arguments of `Sampler.__call__`; None stands for their defaults."""

    steps: int = 1
    guidance: tuple[float, float] | None = None
    sampler: str = "euler"
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    decode_chunk_size: int | None = None


def measure(
    sampler: "Sampler", image: np.ndarray, video: Video | None = None, *, repeats: int = 5, count: bool = True
) -> list[Stage]:
    """Times the `STAGES` of one video.

    Each stage is timed alone and waits for the device. "end to end" does not wait between stages and includes the copy
    of the frames to the host. Compilation is only seen if no call of the same shape came before.

    Args:
      sampler: the loaded checkpoint.
      image: first image, uint8 `[h, w, 3]`.
      video: size and options; None for the defaults of `Video`.
      repeats: warm calls per stage.
      count: counts FLOPs, on the jaxpr, with attention as plain products whichever kernel runs.
    """
    video = video or Video()
    size = sampler.size(image.shape[:2], video.height, video.width)
    shape = sampler.latent_shape(size, video.num_frames)
    keys = jax.random.split(jax.random.key(0), 1)
    noise = jax.random.normal(jax.random.key(1), (1, *shape))
    condition = jax.block_until_ready(sampler.condition([image], size, keys, (6.0, 127.0, 0.02)))
    condition = jax.tree.map(jnp.asarray, condition)
    augmentation = jnp.zeros((1, *size, 3), jnp.float32)
    resized = jnp.zeros((1, *size, 3), jnp.uint8)
    latents = jnp.zeros((1, *shape), jnp.float32)
    whole = dataclasses.asdict(dataclasses.replace(video, height=size[0], width=size[1]))
    how = dict(steps=video.steps, guidance=video.guidance, sampler=video.sampler)
    codec = sampler.codec
    stages = {
        "clip": lambda: codec.embed(resized),
        "encode": lambda: codec.encode_image(resized, augmentation, 0.02),
        "unet": lambda: sampler.latents(condition, noise, keys=keys, **how),
        "decode": lambda: codec.decode(latents, video.decode_chunk_size),
        "end to end": lambda: sampler([image], **whole),
    }
    flops: dict[str, float | None] = dict.fromkeys(stages)
    if count:
        counted = {name: count_flops(stages[name]) for name in ("clip", "encode", "decode")}
        counted["unet"] = count_denoising(sampler, condition, noise, keys, how)
        flops |= counted | {"end to end": sum(counted.values())}
    devices = 1 if sampler.mesh is None else sampler.mesh.size
    one = peak_flops(jax.devices()[0].device_kind)
    found = []
    for name, stage in stages.items():
        timed = warm(stage if sampler.mesh is None else on_mesh(sampler.mesh, stage), repeats)
        found.append(Stage(name, timed, flops[name], one and one * devices))
    return found


def count_denoising(sampler: "Sampler", condition: dict, noise: jax.Array, keys: jax.Array, how: dict) -> float:
    """Counts the FLOPs of `sampler.latents(condition, noise, **how)` on its jaxpr, with attention as plain products."""
    from sfv_jax.sampling.generator import Generator  # needs flax, which nothing else here does

    plain = Generator(dataclasses.replace(sampler.unet, attention_kernel="einsum"), sampler.dtype)

    def denoise(params, condition, noise, keys):
        return plain(params, condition, noise, keys=keys, **how)

    return count_flops(denoise, sampler.params, condition, noise, keys)


def table(stages: list[Stage]) -> tuple[list[str], list[list], list[str]]:
    """Returns (columns, rows, notes) for `evaluation.report.Report.table`."""
    columns = ["stage", "warm, ms", "fastest, ms", "compilation, s", "TFLOP", "TFLOP/s", "share of peak"]
    rows = [
        [
            x.name,
            1e3 * x.timing.median,
            1e3 * x.timing.best,
            x.timing.compilation,
            x.flops and x.flops / 1e12,
            x.tflops,
            x.mfu,
        ]
        for x in stages
    ]
    devices = jax.devices()
    notes = [f"{name}: {meaning}." for name, meaning in STAGES.items() if name in {x.name for x in stages}]
    notes.append(
        f"One video, median of {len(stages[0].timing.seconds)} warm calls, on {devices[0].device_kind} "
        f"({len(devices)} visible). TFLOP: matrix products and convolutions, a multiply-add as two. "
        "Compilation: the extra time of the first call in this process."
    )
    memory = peak_memory()
    notes += [f"Peak memory of a device so far: {memory['memory/peak_gib']:.2f} GiB."] if memory else []
    return columns, rows, notes


def record(stages: list[Stage]) -> dict:
    """Returns the figures of `table` for JSON, in seconds and FLOPs, with the peak memory of the device."""
    found = {}
    for x in stages:
        times = {"first": x.timing.first, "warm": x.timing.seconds, "seconds": x.timing.median}
        found[x.name] = {"name": x.name, **times, "flops": x.flops, "peak": x.peak, "tflops": x.tflops}
    return found | peak_memory()
