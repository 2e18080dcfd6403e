"""The quickstart's videos: a first one, and the comparison of models as a table, strips of frames and an animation."""

from pathlib import Path

import jax
import numpy as np

from sfv_jax.checkpoints.decoders import own_decoder
from sfv_jax.data.images import fitted
from sfv_jax.data.pictures import board, enlarge, sheet
from sfv_jax.data.video import write_video
from sfv_jax.data.worlds import World
from sfv_jax.evaluation.world import score
from sfv_jax.performance.timing import warm
from sfv_jax.runtime.progress import say
from sfv_jax.sampling.sampler import Sampler

CLIPS, SHOWN = 16, 4  # held-out clips that are scored, clips in the picture
FPS = 7
LARGE = 256  # pixels: height of the first video
TINY = "the same with the tiny decoder"
TIMES = {"milliseconds": "ms per video", "decoding": "ms decoding"}
COLUMNS = {  # scores of the table, with their names and digits
    "distance": ("distance", 1),
    "intact": ("intact", 2),
    "body_error": ("body error", 1),
    "shape_kept": ("shape", 2),
    "colour_kept": ("color", 2),
}


def first_video(sampler: Sampler, image: np.ndarray, size: int, path: Path) -> None:
    """Writes an animation of `image uint8 [h, w, 3]`, cropped to a square of `size` pixels, beside its video."""
    image = fitted(image, size, size, "crop")
    frames = sampler([image])
    still = np.repeat(image[None, None], frames.shape[1], axis=1)
    shown = [(title, enlarge(clip, LARGE)) for title, clip in (("image", still), ("video, one step", frames))]
    write_video(path, board(shown), fps=FPS)


def inputs(sampler: Sampler, frames: np.ndarray) -> tuple[dict, jax.Array]:
    """Returns the conditions and the start noise, as `Sampler.latents` takes them, of videos of `frames [n, t, ...]`.

    Args:
      sampler: the model.
      frames: clips uint8 `[n, t, h, w, 3]`, whose first frames are the images.
    """
    first = frames[:, 0]
    size = first.shape[1:3]
    keys = jax.random.split(jax.random.key(0), len(first))
    condition = sampler.condition(list(first), size, keys, (6.0, 127.0, 0.0))
    return condition, jax.random.normal(jax.random.key(1), (len(first), *sampler.latent_shape(size)))


def videos(sampler: Sampler, frames: np.ndarray, steps: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Generates clips from the first frames of `frames`.

    Returns:
      Clips uint8 `[n, t, h, w, 3]`, and the milliseconds of a single video from condition to latents, and from latents
      to frames: the best of five calls after one that compiles.
    """
    condition, noise = inputs(sampler, frames)
    generated = np.asarray(sampler.codec.decode(sampler.latents(condition, noise, steps=steps)))
    one = {k: v[:1] for k, v in condition.items()}
    latents = sampler.latents(one, noise[:1], steps=steps)
    timed = warm(lambda: sampler.latents(one, noise[:1], steps=steps), repeats=5)
    decoded = warm(lambda: sampler.codec.decode(latents), repeats=5)
    return generated, (1000 * timed.best, 1000 * decoded.best)


def by_tiny_decoder(sampler: Sampler) -> Sampler | None:
    """Returns the same sampler with the tiny decoder of its model; None if there is none."""
    model = sampler.model
    return sampler.with_decoder("tiny") if model is not None and own_decoder(model) is not None else None


def compare(
    world: World, base: Sampler, distilled: Sampler, packaged: Sampler | None = None
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Samples and scores models on held-out clips, and says which; returns (rows of the table, clips by name).

    If the last model has a tiny decoder, the last row is of its videos decoded by it. Those clips, which look the same,
    are not returned.

    Args:
      world: the world of the clips.
      base: the base model.
      distilled: SF-V from it.
      packaged: SF-V of the package, for another row.
    """
    truth, labels = world.batch(range(CLIPS), "heldout")
    clips = {"truth": truth, "still image": np.repeat(truth[:, :1], truth.shape[1], axis=1)}
    latency = {}
    ways = [
        ("base model, 25 steps", base, 25),
        ("base model, 4 steps", base, 4),
        ("base model, 1 step", base, 1),
        ("SF-V, 1 step, distilled here", distilled, 1),
    ]
    if packaged is not None:
        ways.append(("SF-V, 1 step, of the package", packaged, 1))
    tiny = by_tiny_decoder(packaged or distilled)
    if tiny is not None:
        ways.append((TINY, tiny, 1))
    for name, sampler, steps in ways:
        say(f"{name}: {CLIPS} videos, and the time of one ...")
        clips[name], latency[name] = videos(sampler, truth, steps)
    rows = []
    for name, frames in clips.items():
        scores = score(world, labels, frames)
        times = dict(zip(TIMES, latency.get(name, (None, None)), strict=True))
        rows.append({"name": name} | times | {key: scores[key] for key in COLUMNS})
    return rows, {name: frames for name, frames in clips.items() if name != TINY}


def table(rows: list[dict]) -> str:
    """Returns the rows as a Markdown table, with the definitions of its columns."""
    titles = [title for title, _ in COLUMNS.values()]
    titles = [*TIMES.values(), *titles]
    lines = [f"| | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for row in rows:
        cells = ["" if row[key] is None else f"{row[key]:.0f}" for key in TIMES]
        cells += [f"{row[key]:.{digits}f}" for key, (_, digits) in COLUMNS.items()]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    notes = [
        f"{CLIPS} held-out first frames.",
        "Distance: RMSE in gray levels (0..255) to the nearest legal continuation, 0 is perfect.",
        "Intact: share of frames in which a body has its size, shape and color, wherever it is; low for a smear.",
        "Body error: pixels between a body and the nearest legal path; one that is not intact counts half the frame.",
        "Shape, color: shares of frames and bodies that keep those of the first frame.",
        "A still image keeps all of these but moves nowhere, which its distance shows.",
        "Times of one video on this machine, warm: condition to latents, and latents to frames.",
    ]
    return "\n".join([*lines, "", *notes])


def picture(clips: dict[str, np.ndarray], path: Path) -> None:
    """Writes a picture and an animation of the first clips.

    Args:
      clips: `{method: uint8 [n, t, h, w, 3]}`, "truth" among them; "still image" is shown in the animation alone.
      path: PNG with the frames of a clip side by side, one row per clip and method. The animation has the suffix .gif.
    """
    shown = {name: clip[:SHOWN] for name, clip in clips.items() if name != "still image"}
    rows = [(name, clip[n]) for n in range(len(clips["truth"][:SHOWN])) for name, clip in shown.items()]
    write_video(path, sheet(rows, len(shown))[None])
    still = {"condition": clips["still image"][:SHOWN]} if "still image" in clips else {}
    write_video(path.with_suffix(".gif"), board([*(still | shown).items()]), fps=FPS)
