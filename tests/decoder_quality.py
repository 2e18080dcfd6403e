"""What a tiny decoder costs in quality, and saves in time, in the procedural world.

    python -m tests.decoder_quality --checkpoint world [--decoder tiny] [--base world-teacher] [--clips 32] [--out DIR]

The first table decodes latents of held-out clips, which are encoded, and of videos of the checkpoint by both decoders:

  PSNR, SSIM   of the frames, against the truth and against the VAE's decoder
  flicker      mean absolute error of the differences of consecutive frames, in gray levels

The second has the world's exact scores (`sfv_jax.evaluation.world`) of the same videos by either decoder and, as a
measure for the difference, those of the base model in 16 and in 8 steps. The third has times of one video: UNet, each
decoder, and the first frame of a stream. The picture shows frames by both decoders below each other, enlarged, and what
differs, four times as strong.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from sfv_jax.checkpoints.base import training_config, world_rules
from sfv_jax.config_check import checked_world
from sfv_jax.data.pictures import psnr, sheet
from sfv_jax.data.video import write_video
from sfv_jax.evaluation.world import score
from sfv_jax.performance.timing import alternate, warm
from sfv_jax.reproduction.strips import inputs
from sfv_jax.sampling import Sampler

WINDOW, SIGMA = 11, 1.5  # of SSIM, as in its paper (Wang et al. 2004)
SHOWN = 3  # clips in the picture
SCORES = ("distance", "fit", "shape_kept", "colour_kept", "path_error", "legal")
GAIN = 4
OPTIONS = {"noise_aug_strength": 0.0}  # as in the world


def blurred(x: np.ndarray) -> np.ndarray:
    """Returns `x [..., h, w]` under the Gaussian window, where the window lies inside."""
    line = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * SIGMA**2))
    line /= line.sum()
    for axis in (-1, -2):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis) @ line
    return x


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the structural similarity of frames uint8 `[..., h, w, 3]`, a mean over positions, channels, frames."""
    x, y = (np.moveaxis(v.astype(np.float64), -1, -3) for v in (a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blurred(x), blurred(y)
    vx, vy, both = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    likeness = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(likeness.mean())


def flicker(made: np.ndarray, truth: np.ndarray) -> float:
    """Returns the mean absolute error of frame differences of clips uint8 `[n, t, h, w, 3]`, in gray levels."""
    return float(np.abs(np.diff(made.astype(float), axis=1) - np.diff(truth.astype(float), axis=1)).mean())


def compared(kind: str, name: str, made: np.ndarray, other: np.ndarray) -> str:
    """Returns a row of the first table."""
    return f"| {kind} | {name} | {psnr(made, other):.1f} | {ssim(made, other):.3f} | {flicker(made, other):.2f} |"


def scored(name: str, found: dict) -> str:
    """Returns a row of the second table."""
    return f"| {name} | " + " | ".join(f"{found[key]:.3f}" for key in SCORES) + " |"


def generated(sampler: Sampler, truth: np.ndarray, steps: int, decoder: str) -> dict[str, np.ndarray]:
    """Returns the same videos of the first frames of `truth` by the VAE's decoder, "full", and by `decoder`, "tiny"."""
    latents = sampler.latents(*inputs(sampler, truth), steps=steps)
    codecs = {"full": sampler.codec, "tiny": sampler.with_decoder(decoder).codec}
    return {name: np.asarray(codec.decode(latents)) for name, codec in codecs.items()}


def first_frame(sampler: Sampler, image: np.ndarray) -> tuple[float, float]:
    """Returns the seconds from the end of the UNet to the first streamed frame and to the last, of a warm call."""
    seconds: list[float] = []
    for _ in range(2):
        coming = sampler.stream(image, **OPTIONS, times={})  # waits for the UNet
        began, seconds = time.perf_counter(), []
        for _ in coming:
            seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[-1]


def picture(clips: list[tuple[str, np.ndarray]], path: Path) -> None:
    """Writes the first videos of `clips` below each other; after the last, its difference from the one before."""
    frames = dict(clips)
    full, tiny = (frames[name].astype(int) for name, _ in clips[-2:])
    clips = [*clips, (f"difference x {GAIN}", np.clip(128 + GAIN * (tiny - full), 0, 255).astype(np.uint8))]
    rows = [(name, clip[n]) for n in range(min(SHOWN, len(full))) for name, clip in clips]
    write_video(path, sheet(rows, len(clips))[None])


def print_times(samplers: dict[str, Sampler], latents: np.ndarray, image: np.ndarray) -> None:
    """Prints the third table, of one video with `latents [1, t, h, w, c]` or of `image`."""
    calls = {name: lambda sampler=sampler: sampler.codec.decode(latents) for name, sampler in samplers.items()}
    decoding = {name: 1000 * timing.median for name, timing in alternate(calls, 9).items()}
    print("\n| decoder | decoding, ms | image to frames, ms | first streamed frame, ms | last, ms |")
    print("| --- |" + " ---: |" * 4)
    for name, sampler in samplers.items():
        whole = 1000 * warm(lambda sampler=sampler: sampler([image], **OPTIONS), 5).median
        first, last = (1000 * seconds for seconds in first_frame(sampler, image))
        print(f"| {name} | {decoding[name]:.1f} | {whole:.1f} | {first:.1f} | {last:.1f} |")
    print(f"full / tiny in decoding: {decoding['full'] / decoding['tiny']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="world", help="a one-step model of the world, on latents of a VAE")
    parser.add_argument("--decoder", default="tiny", help="as for sfv_jax.sample")
    parser.add_argument("--base", default="world-teacher", help="base model sampled in 16 and 8 steps; '': none")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    asked = parser.parse_args()
    full = Sampler.load(asked.checkpoint)
    samplers = {"full": full, "tiny": full.with_decoder(asked.decoder)}
    world = checked_world(world_rules(training_config(asked.checkpoint)))
    truth, labels = world.batch(range(asked.clips), "heldout")
    latents = full.codec.encode(truth) * full.codec.scaling_factor
    encoded = {name: np.asarray(sampler.codec.decode(latents)) for name, sampler in samplers.items()}
    made = generated(full, truth, 1, asked.decoder)
    print(f"{asked.clips} held-out clips of {asked.checkpoint}; tiny: {samplers['tiny'].decoder}\n")
    print("| latents | frames | PSNR, dB | SSIM | flicker |\n| --- | --- | ---: | ---: | ---: |")
    for name, frames in encoded.items():
        print(compared("encoded", f"{name} and truth", frames, truth))
    print(compared("encoded", "tiny and full", encoded["tiny"], encoded["full"]))
    print(compared("generated", "tiny and full", made["tiny"], made["full"]), flush=True)

    print("\n| videos | " + " | ".join(SCORES) + " |\n| --- |" + " ---: |" * len(SCORES))
    for name, frames in made.items():
        print(scored(f"one step, {name}", score(world, labels, frames)), flush=True)
    if asked.base:
        base = Sampler.load(asked.base)
        for steps in (16, 8):
            for name, frames in generated(base, truth, steps, asked.decoder).items():
                print(scored(f"base, {steps} steps, {name}", score(world, labels, frames)), flush=True)

    print_times(samplers, latents[:1], truth[0, 0])
    asked.out.mkdir(parents=True, exist_ok=True)
    shown = [("truth", truth), ("encoded, full", encoded["full"]), ("encoded, tiny", encoded["tiny"])]
    picture(shown, asked.out / "decoders_encoded.png")
    shown = [(f"generated, {name}", frames) for name, frames in made.items()]
    picture(shown, asked.out / "decoders_generated.png")
    print(f"look at {asked.out}/decoders_encoded.png and decoders_generated.png")


if __name__ == "__main__":
    main()
