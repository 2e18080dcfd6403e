"""How long each stage of sampling takes, compilation apart, and how many FLOPs it does.

Needs nothing but jax, flax, einops and numpy; a `sampler` is a `sfv_jax.sampler.Sampler`.

    timings = measure(sampler, image, steps=1)
    columns, rows, notes = table(timings)  # for evaluation.report.Report.table
"""

import dataclasses
import statistics
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.performance import timing
from sfv_jax.runtime.device import count_flops, peak_flops, peak_memory
from sfv_jax.runtime.sharding import on_mesh

STAGES = {
    "clip": "image embedding by the CLIP tower",
    "encode": "conditioning latent by the VAE's encoder",
    "unet": "all calls of the UNet, from noise to latents: what the SF-V paper reports",
    "decode": "frames by the VAE's decoder",
    "end to end": "image to frames in host memory",
}


@dataclass(frozen=True)
class Timing:
    """Of one stage.

    Attributes:
      first: seconds of the first call in this process, compilation included (a program found in a cache is read).
      warm: seconds of each later call.
      flops: matrix products and convolutions of a call over all devices, a multiply-add as two; None if not counted.
      peak: FLOP/s of the devices by their data sheet, None if not known.
    """

    name: str
    first: float
    warm: tuple[float, ...]
    flops: float | None = None
    peak: float | None = None

    @property
    def seconds(self) -> float:
        """Median of the warm calls."""
        return statistics.median(self.warm)

    @property
    def compilation(self) -> float:
        """What the first call took longer."""
        return max(self.first - self.seconds, 0.0)

    @property
    def tflops(self) -> float | None:
        """TFLOP/s of a warm call."""
        return self.flops / self.seconds / 1e12 if self.flops else None

    @property
    def mfu(self) -> float | None:
        """Share of the peak."""
        return self.flops / self.seconds / self.peak if self.flops and self.peak else None


def measure(
    sampler,
    image: np.ndarray,
    *,
    steps: int = 1,
    guidance: tuple[float, float] | None = None,
    schedule: str = "euler",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    decode_chunk_size: int | None = None,
    repeats: int = 5,
    count: bool = True,
) -> list[Timing]:
    """Timings of `STAGES` for one video from `image`, uint8 `[h, w, 3]`.

    Stages are timed alone, each waiting for the device. End to end does not wait between them, and includes the copy of
    the frames. For the compilation to be seen, call this before anything else of the same shape.

    Args:
      schedule: a name of `sampler.SAMPLERS`.
      count: count FLOPs, on the jaxpr; attention as plain products whatever kernel runs.
    """
    size = sampler.size(image, height, width)
    shape = sampler.latent_shape(size, num_frames)
    keys = jax.random.split(jax.random.key(0), 1)
    noise = jax.random.normal(jax.random.key(1), (1, *shape))
    condition = jax.block_until_ready(sampler.condition([image], size, keys, (6.0, 127.0, 0.02)))
    condition = jax.tree.map(jnp.asarray, condition)
    augmentation = jnp.zeros((1, *size, 3), jnp.float32)
    resized = jnp.zeros((1, *size, 3), jnp.uint8)
    options = dict(steps=steps, guidance=guidance, sampler=schedule)
    latents = jnp.zeros((1, *shape), jnp.float32)
    whole = dict(num_frames=num_frames, height=size[0], width=size[1], decode_chunk_size=decode_chunk_size)
    codec = sampler.codec
    stages = {
        "clip": lambda: codec.embed(resized),
        "encode": lambda: codec.encode_image(resized, augmentation, 0.02),
        "unet": lambda: sampler.latents(condition, noise, keys=keys, **options),
        "decode": lambda: codec.decode(latents, decode_chunk_size),
        "end to end": lambda: sampler([image], **whole, **options),
    }
    flops = dict.fromkeys(stages)
    if count:
        flops |= {name: count_flops(stages[name]) for name in ("clip", "encode", "decode")}
        flops["unet"] = count_denoising(sampler, condition, noise, keys, options)
        flops["end to end"] = sum(flops[name] for name in ("clip", "encode", "unet", "decode"))
    devices = 1 if sampler.mesh is None else sampler.mesh.size
    one = peak_flops(jax.devices()[0].device_kind)
    found = []
    for name, stage in stages.items():
        timed = timing.warm(stage if sampler.mesh is None else on_mesh(sampler.mesh, stage), repeats)
        found.append(Timing(name, timed.first, timed.seconds, flops[name], one and one * devices))
    return found


def count_denoising(sampler, condition: dict, noise: jax.Array, keys: jax.Array, options: dict) -> float:
    """FLOPs of `sampler.latents(condition, noise, ...)` with attention as plain products; nothing is run."""
    unet = dataclasses.replace(sampler.unet, attention_kernel="einsum")
    plain = type(sampler)(unet, None, sampler.codec, sampler.dtype)

    def denoise(params, condition, noise, keys):
        plain.params = params
        return plain.latents(condition, noise, keys=keys, **options)

    return count_flops(denoise, sampler.params, condition, noise, keys)


def table(timings: list[Timing]) -> tuple[list[str], list[list], list[str]]:
    """(columns, rows, notes) for a report."""
    columns = ["stage", "warm, ms", "fastest, ms", "compilation, s", "TFLOP", "TFLOP/s", "share of peak"]
    rows = [
        [x.name, 1e3 * x.seconds, 1e3 * min(x.warm), x.compilation, x.flops and x.flops / 1e12, x.tflops, x.mfu]
        for x in timings
    ]
    devices = jax.devices()
    notes = [f"{name}: {meaning}." for name, meaning in STAGES.items() if name in {x.name for x in timings}]
    notes.append(
        f"One video, median of {len(timings[0].warm)} warm calls, on {devices[0].device_kind} ({len(devices)} visible)."
        " TFLOP: matrix products and convolutions, a multiply-add as two. Compilation: what the first call in this"
        " process took longer."
    )
    memory = peak_memory()
    notes += [f"Peak memory of a device so far: {memory['memory/peak_gib']:.2f} GiB."] if memory else []
    return columns, rows, notes


def record(timings: list[Timing]) -> dict:
    """The same for JSON."""
    return {x.name: dataclasses.asdict(x) | {"seconds": x.seconds, "tflops": x.tflops} for x in timings} | peak_memory()
