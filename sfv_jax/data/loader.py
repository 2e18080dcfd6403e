"""Batches from records: shuffled, sharded over processes, resumable to the exact example (grain).

A source has `len` and `[]`; an item is one example:

  latents      float32 [t, h, w, c]  scaled, the input of the diffusion model
  cond_latent  float32 [h, w, c]     unscaled, as in SVD's training
  image_embed  float32 [d]
  ids          float32 [3]           (fps - 1, motion_bucket_id, noise_aug_strength)
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from sfv_jax.data.latents import ARRAYS, MANIFEST, SCHEMA, LatentError, count_records, read_json, shard_path
from sfv_jax.data.worlds import World
from sfv_jax.errors import UserError
from sfv_jax.models.codec import PatchCodec, SVDCodec

Example = dict[str, np.ndarray]
KEPT = 2**29  # bytes of examples that a `WorldSource` keeps
REMAKE = "delete that file and run `python -m sfv_jax.prepare` as before: it makes missing files again"


def micro_conditioning(fps: float, motion_bucket_id: float, noise_aug_strength: float) -> np.ndarray:
    """Returns SVD's three extra conditions, float32 `[3]`; SVD was trained with the rate minus one, 6 for 7 fps."""
    return np.array([fps - 1, motion_bucket_id, noise_aug_strength], np.float32)


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Examples of a latent cache; see `latent_source`.

    Raises:
      LatentError: by `[]`, if a record cannot be read, has another version or contains NaN or infinity.
    """

    folder: Path
    split: str
    shard_lengths: tuple[int, ...]
    records: Sequence[dict[str, Any]]
    scaling_factor: float

    def __len__(self) -> int:
        return sum(self.shard_lengths)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self.records[index]
        except (RuntimeError, ValueError, OSError) as error:  # from the record reader, and from numpy for another shape
            raise LatentError(f"{self.shard(index)} is damaged ({error}); {REMAKE}") from error
        clip = record["key"].decode()
        if record["schema"] != SCHEMA:
            raise LatentError(f"clip {clip}: schema {record['schema']}, this code reads {SCHEMA}; make the cache anew")
        for name in ARRAYS:
            if not np.isfinite(record[name]).all():
                raise LatentError(f"clip {clip}: {name} is not finite; {REMAKE} ({self.shard(index)})")
        return {
            "latents": record["latents"].astype(np.float32) * np.float32(self.scaling_factor),
            "cond_latent": record["cond_latent"].astype(np.float32),
            "image_embed": record["image_embed"].astype(np.float32),
            "ids": micro_conditioning(record["fps"], record["motion_bucket_id"], record["noise_aug_strength"]),
        }

    def shard(self, index: int) -> Path:
        """Returns the file of record `index`."""
        ends = np.cumsum(self.shard_lengths)
        return shard_path(self.folder, self.split, int(np.searchsorted(ends, index, side="right")), len(ends))


def latent_source(data_dir: str | os.PathLike, split: str = "train", scaling_factor: float = 0.18215) -> LatentSource:
    """Opens a cache made by `python -m sfv_jax.prepare`.

    Args:
      data_dir: folder of the cache.
      split: "train" or "heldout".
      scaling_factor: factor of the latents (not of `cond_latent`); 0.18215 is that of SVD's VAE.
    Raises:
      LatentError: if the cache is missing, incomplete or unreadable, or lacks the split or a whole shard.
    """
    folder = Path(data_dir)
    try:
        if not folder.is_dir():
            raise LatentError(f"{folder}: no such folder; make a cache with `python -m sfv_jax.prepare`")
        if any(read_json(folder / name) is None for name in ("dataset_info.json", "features.json")):
            started = (folder / MANIFEST).exists()
            remedy = "run the same command to its end" if started else "make one with `python -m sfv_jax.prepare`"
            raise LatentError(f"{folder}: {'a cache that is not finished' if started else 'no latent cache'}; {remedy}")
        builder = tfds.builder_from_directory(os.fspath(folder))
        if split not in builder.info.splits:
            raise LatentError(f"{folder}: no split {split!r}, only {sorted(builder.info.splits)}")
        lengths = tuple(builder.info.splits[split].shard_lengths)
        for index, expected in enumerate(lengths):
            path = shard_path(folder, split, index, len(lengths))
            path.open("rb").close()  # the reader's message for a file without permission is obscure
            if (found := count_records(path)) != expected:
                problem = "cannot be read" if found < 0 else f"holds {found} records"
                raise LatentError(f"{path} {problem}, expected {expected} records; {REMAKE}")
    except FileNotFoundError as error:
        raise LatentError(f"{error.filename} is missing: run `python -m sfv_jax.prepare` as before") from error
    except PermissionError as error:
        raise LatentError(f"{error.filename or folder} may not be read by this user: change its permissions") from error
    # A decorator of TFDS hides that the method is bound.
    records: Any = builder.as_data_source(split)  # pyrefly: ignore[bad-argument-type]
    return LatentSource(folder, split, lengths, records, scaling_factor)


def encoders_of(data_dir: str | os.PathLike) -> str:
    """Returns the identity of the encoders that made a cache; "" if the manifest lacks it."""
    return (read_json(Path(data_dir) / MANIFEST) or {}).get("settings", {}).get("model", "")


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """`size` clips of a procedural world, rendered on access; example i is always the same.

    The conditions are 7 fps, motion bucket 127 and no noise on the first frame. Examples that a VAE has encoded are
    kept in memory, up to `KEPT` bytes. With `pixels` they also have the rendered `frames` uint8 `[t, h, w, 3]`.
    """

    world: World
    split: str
    size: int
    codec: PatchCodec | SVDCodec
    pixels: bool = False
    kept: dict[int, Example] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if index in self.kept:
            return self.kept[index]
        example = self._encoded(index)
        if isinstance(self.codec, SVDCodec) and sum(x.nbytes for x in example.values()) * len(self.kept) < KEPT:
            self.kept[index] = example
        return example

    def _encoded(self, index: int) -> Example:
        frames, _ = self.world.clip(index, self.split)
        latents = np.asarray(self.codec.encode(frames[None])[0], np.float32)
        return {
            "latents": latents * np.float32(self.codec.scaling_factor),
            "cond_latent": latents[0],
            "image_embed": np.asarray(self.codec.embed(frames[:1])[0], np.float32),
            "ids": micro_conditioning(7, 127, 0),
        } | ({"frames": frames} if self.pixels else {})


@dataclasses.dataclass(frozen=True)
class FrameSource:
    """Pixels of `size` clips of a procedural world, rendered on access; example i is always the same.

    An example is `{"frames": uint8 [num_frames, h, w, 3]}`: consecutive frames from anywhere in a clip.
    """

    world: World
    split: str
    size: int
    num_frames: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        begin = int(np.random.default_rng(index).integers(self.world.num_frames - self.num_frames + 1))
        label = self.world.label(index, self.split)
        return {"frames": self.world.render(label, slice(begin, begin + self.num_frames))}


def world_source(world: World, split: str, size: int, codec: PatchCodec | SVDCodec) -> WorldSource:
    """Returns the first `size` clips of `split` of a procedural world, encoded by `codec`."""
    return WorldSource(world, split, size, codec)


def make_loader(
    source: Sequence[Example],
    *,
    global_batch_size: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
    transform: Callable[[Example], Example] | None = None,
    num_threads: int = 8,
) -> grain.DatasetIterator:
    """Returns an endless iterator over this process's rows of every batch, in a new order each epoch.

    `next` returns stacked examples `[len(rows), ...]`. Row r of batch k is the same example on every process.
    `get_state()` returns a small JSON-serializable dict; `set_state` continues exactly after it, also with other
    `rows`.

    Args:
      source: examples with random access, the same on every process.
      global_batch_size: examples per batch over all processes.
      seed: seed of the order.
      rows: rows of the global batch to read (`sharding.local_rows`); default: all.
      transform: function of one example, applied to each.
      num_threads: number of reading threads.
    Raises:
      ValueError: if a row is not in the batch.
      UserError: if the source is smaller than a batch.
    """
    rows = list(range(global_batch_size)) if rows is None else [int(row) for row in rows]
    if not rows or min(rows) < 0 or max(rows) >= global_batch_size:
        raise ValueError(f"rows {rows} are not rows of a batch of {global_batch_size}")
    if len(source) < global_batch_size:
        count = len(source)
        raise UserError(f"the data has {count} clips, fewer than one batch; set batch_size to {count} or less")
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    count = len(rows) * (len(order) // global_batch_size)
    dataset = grain.MapDataset.range(count).map(
        lambda n: order[n // len(rows) * global_batch_size + rows[n % len(rows)]]
    )
    if transform is not None:
        # grain's stubs allow for filtered elements, which are None; there is no filter here.
        dataset = dataset.map(transform)  # pyrefly: ignore[bad-argument-type]
    dataset = dataset.batch(len(rows), drop_remainder=True)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2, num_threads))
    return iter(dataset.to_iter_dataset(options))
