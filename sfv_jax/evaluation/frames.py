"""Scores of frames by SVD's own CLIP tower: CMMD between sets of clips, and similarity to the condition over time.

CMMD (Jayasumana et al., arXiv 2401.09603) is 1000 times the squared maximum mean discrepancy of normalized CLIP
embeddings, with the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma = 10. The published program (google-research/cmmd)
embeds with ViT-L/14 at 336 pixels; here the tower is SVD's ViT-H/14, preprocessing included, exactly as conditions are
embedded. The published estimate counts each embedding against itself, a bias of order 1/n. The estimate here is
unbiased: the samples are clips, whose frames resemble each other, so all pairs of frames of one clip are left out.

Similarity is the cosine of the embeddings of a frame and of the condition, as in the subject consistency of VBench
(arXiv 2311.17982), which compares features of DINO with those of the first and the previous frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from sfv_jax.checkpoints.checksums import fingerprints
from sfv_jax.checkpoints.model_folder import load_model, read_model
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.mmd import Estimate, common_size, from_halves
from sfv_jax.evaluation.protocol import digest
from sfv_jax.evaluation.report import UP, Report, Spread
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig, embedder
from sfv_jax.runtime.files import one_line
from sfv_jax.weights.folders import WeightsError

SIGMA, FACTOR = 10.0, 1000.0  # of CMMD
MEANING = (
    "CMMD: 1000 times the squared maximum mean discrepancy of the frames' CLIP embeddings, kernel "
    "exp(-|x - y|^2 / 200), without pairs of frames of one clip, so that its expectation is 0 for equal distributions; "
    "its interval is from random halves of the clips. CLIP, last and mean: cosine of the embeddings of a frame and of "
    "the condition, last frame and mean over the frames; mean (standard deviation) over the clips."
)
SIMILARITY = [f"CLIP, last {UP}", f"CLIP, mean {UP}"]  # columns of `Similarity.cells`


@dataclass(frozen=True)
class Tower:
    """SVD's CLIP image tower.

    Attributes:
      embed: function from images uint8 `[b, h, w, 3]` of any size to embeddings float32 `[b, d]` of length 1.
      about: its JSON description, for records.
    """

    embed: Callable[[np.ndarray], np.ndarray]
    about: dict[str, Any]

    @classmethod
    def of(cls, config: CLIPConfig, params: tree.Params) -> "Tower":
        """Returns the tower with `params`; it embeds images exactly as conditions are embedded."""
        embed = embedder(config)

        def unit(images: np.ndarray) -> np.ndarray:
            x = np.asarray(embed(params, images), np.float64)
            return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

        return cls(unit, {"kind": "SVD's CLIP tower", "weights": digest(fingerprints(params))})

    @classmethod
    def load(cls, folder) -> "Tower":
        """Loads the tower of a model folder.

        Raises:
          WeightsError: if it is no model folder, or has no CLIP tower.
        """
        model = read_model(folder)
        if "image_encoder" not in model.meta["components"]:
            raise WeightsError(f"{one_line(folder)} has no CLIP tower: name a model folder converted from SVD")
        params, configs, _ = load_model(model, ("image_encoder",))
        return cls.of(configs["image_encoder"], params["image_encoder"])

    @property
    def extractor(self) -> Extractor:
        """The tower as a function of clips uint8 `[b, t, h, w, 3]` to embeddings of all frames in a row, `[b, t d]`."""
        return Extractor(lambda clips: np.stack([self.embed(x).reshape(-1) for x in clips]), self.about, batch_size=1)

    def similarity(self, frames: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Returns the cosine `[t]` of each frame, uint8 `[t, h, w, 3]`, with the condition, uint8 `[h', w', 3]`."""
        return similarity(self.embed(frames), self.embed(image[None])[0])


def per_frame(rows: np.ndarray, num_frames: int) -> np.ndarray:
    """Returns embeddings `[n, t, d]` from the rows `[n, t d]` of `Tower.extractor`."""
    return rearrange(rows, "n (t d) -> n t d", t=num_frames)


def similarity(frames: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """Returns the cosine `[..., t]` of embeddings `[..., t, d]` with the condition's, `[..., d]`, all of length 1."""
    return np.einsum("...td,...d->...t", frames, condition)


@dataclass(frozen=True)
class Similarity:
    """Similarity of the frames of a set of clips to their conditions, over the clips.

    Attributes:
      mean, last: the mean over the frames of a clip, and its last frame.
      curve: mean over the clips for each frame.
      n: number of clips.
    """

    mean: Spread
    last: Spread
    curve: list[float]
    n: int

    @classmethod
    def of(cls, curves: np.ndarray) -> "Similarity":
        """Summarizes the similarities `[n, t]` of n clips."""
        curves = np.asarray(curves, np.float64)
        mean, last = (Spread(float(x.mean()), float(x.std())) for x in (curves.mean(1), curves[:, -1]))
        return cls(mean, last, curves.mean(0).tolist(), len(curves))

    @property
    def cells(self) -> list[Spread]:
        """The cells under `SIMILARITY`."""
        return [self.last, self.mean]


def add_curves(report: Report, found: dict[str, Similarity]) -> None:
    """Adds the similarities of sets over time to the page."""
    report.lines("CLIP cosine with the condition", {k: x.curve for k, x in found.items()}, "frame", "mean over clips")


def notes(about: dict[str, Any], condition: str) -> list[str]:
    """Returns the footer of a table with CMMD and similarity."""
    made = ", ".join(f"{k} {v}" for k, v in about.items())
    return [f"Frames: {made}. Condition: {condition}.", MEANING]


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the mean of exp(-|a - b|^2 / (2 sigma^2)) over the frames a of a clip and b of another.

    Args:
      x, y: embeddings `[n, t, d]` and `[m, s, d]`.
    Returns:
      float64 `[n, m]`.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    flat, lengths = rearrange(y, "m s d -> (m s) d"), np.square(y).sum(-1).reshape(-1)
    rows = []
    for clip in x:  # n m t s numbers at once would be too many
        squares = np.square(clip).sum(-1)[:, None] + lengths - 2 * clip @ flat.T
        rows.append(np.exp(-squares / (2 * SIGMA**2)).reshape(len(clip), *y.shape[:2]).mean((0, 2)))
    return np.stack(rows)


def measure_cmmd(
    real: np.ndarray, fake: np.ndarray, *, paired: bool = False, resamples: int = 200, seed: int = 0
) -> Estimate:
    """Measures CMMD between the frames of two sets of clips, with an interval from random halves of the clips.

    Args:
      real, fake: embeddings `[n, t, d]` of length 1.
      paired: clip k of `real` and clip k of `fake` have one condition, so pairs of their frames are left out too.
      resamples, seed: as for `mmd.measure_mmd`.
    Raises:
      UserError: if the sets differ in size, are fewer than 5, or not finite.
    """
    n = common_size(real, fake)
    first, second, cross = kernel(real, real), kernel(fake, fake), kernel(real, fake)

    def between(rows: np.ndarray, others: np.ndarray) -> float:
        own = _mean(first[np.ix_(rows, rows)], True) + _mean(second[np.ix_(others, others)], True)
        return FACTOR * (own - 2 * _mean(cross[np.ix_(rows, others)], paired))

    return from_halves(n, between, paired=paired, resamples=resamples, seed=seed)


def _mean(values: np.ndarray, distinct: bool) -> float:
    """Returns the mean of `values [n, m]`, without the diagonal if `distinct`."""
    if not distinct:
        return float(values.mean())
    n = len(values)
    return float(values.sum() - np.trace(values)) / (n * (n - 1))
