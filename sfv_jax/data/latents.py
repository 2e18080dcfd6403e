"""The latent cache: what the frozen encoders say about each clip, computed once, in ArrayRecord shards that TFDS reads.

A folder holds `latents-SPLIT.array_record-IIIII-of-NNNNN` shards, `manifest.json` (what made them) and the TFDS
metadata. Metadata comes last, so a folder that has it is finished. One record, channels last:

  latents            float16 [t, h, w, c]  posterior means, unscaled
  cond_latent        float16 [h, w, c]     mean of the noise-augmented first frame, unscaled; not latents[0]
  image_embed        float16 [d]           CLIP embedding of the first frame
  fps, motion_bucket_id, noise_aug_strength  float32, as given to `prepare`
  key, source, start                       the clip's name, its file, and where in it the clip begins (s)
  schema                                   int32, the version of this layout

float16 holds the means to 3 digits and loads without TensorFlow, which TFDS would need for bfloat16.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from sfv_jax.errors import UserError
from sfv_jax.runtime.files import replacing

SCHEMA = 1
NAME = "latents"
MANIFEST = "manifest.json"
ARRAYS = ("latents", "cond_latent", "image_embed")


class LatentError(UserError):
    """A cache, or a record meant for one, that must not be used; the message says which and why."""


def features(shapes: dict[str, Iterable[int]]) -> tfds.features.FeaturesDict:
    """The TFDS schema of a record, given the shapes of its arrays by name (see `ARRAYS`)."""
    # Raw bytes: the default encoding stores float16 as a list of float32.
    tensors = {
        name: tfds.features.Tensor(shape=tuple(shapes[name]), dtype=np.float16, encoding="bytes") for name in ARRAYS
    }
    return tfds.features.FeaturesDict(
        {
            **tensors,
            "fps": np.float32,
            "motion_bucket_id": np.float32,
            "noise_aug_strength": np.float32,
            "key": tfds.features.Text(),
            "source": tfds.features.Text(),
            "start": np.float32,
            "schema": np.int32,
        }
    )


def shapes_of(record: dict) -> dict[str, list[int]]:
    """The shapes of a record's arrays by name."""
    return {name: list(np.shape(record[name])) for name in ARRAYS}


def to_float16(key: str, name: str, values: np.ndarray) -> np.ndarray:
    """`values` as float16. Raises LatentError, naming clip `key`, for what is not finite or does not fit."""
    with np.errstate(over="ignore"):
        half = np.asarray(values).astype(np.float16)
    bad = half.size - np.count_nonzero(np.isfinite(half))
    if bad:
        raise LatentError(f"clip {key}: {bad} of {half.size} values of {name} are NaN or beyond float16")
    return half


def shard_path(folder: str | os.PathLike, split: str, index: int, total: int) -> Path:
    """Where shard `index` of the `total` shards of `split` lies."""
    return Path(folder) / f"{NAME}-{split}.array_record-{index:05d}-of-{total:05d}"


def write_shard(path: Path, records: Iterable[dict]) -> tuple[int, dict[str, list[int]]]:
    """Write one shard, which appears under `path` when it is complete.

    Args:
      path: the final name, from `shard_path`.
      records: dicts with the keys of `features`; arrays from `to_float16`.
    Returns:
      the number of records and their shapes by name, `{}` for a shard without records.
    Raises:
      LatentError: if shapes differ between records.
    """
    count, shapes, schema = 0, {}, None
    for abandoned in path.parent.glob(f".{path.name}.*.tmp"):  # by a run that was killed
        abandoned.unlink()
    with replacing(path) as temporary:
        # One record a group, uncompressed: the fastest to read in random order, and latents hardly compress.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for record in records:
                if not shapes:
                    shapes = shapes_of(record)
                    schema = features(shapes)
                if shapes_of(record) != shapes:
                    raise LatentError(f"clip {record['key']}: shapes {shapes_of(record)} differ from {shapes}")
                writer.write(_ordered(schema.serialize_example(record)))
                count += 1
        finally:
            writer.close()
    return count, shapes


def _ordered(example: bytes) -> bytes:
    """The same record with its fields in one order: a process orders them as it likes, and caches should be equal."""
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def count_records(path: Path) -> int:
    """The number of records in a shard, -1 if there is none or it cannot be read."""
    if not path.is_file():
        return -1
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except RuntimeError:  # the library's word for a truncated file
        return -1
    return count


def write_metadata(folder: str | os.PathLike, shapes: dict[str, Iterable[int]], counts: dict[str, list[int]]) -> None:
    """Declare the cache finished: after this TFDS and `loader.latent_source` accept the folder.

    Args:
      folder: holds every shard.
      shapes: shapes of the arrays by name.
      counts: for each split the number of records in each of its shards, in order.
    """
    splits = []
    for split, lengths in counts.items():
        paths = [shard_path(folder, split, index, len(lengths)) for index in range(len(lengths))]
        size = sum(path.stat().st_size for path in paths)
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    # Without split_infos, or with check_data, TFDS imports TensorFlow.
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder), features=features(shapes), split_infos=splits, check_data=False
    )


def read_json(path: Path) -> dict | None:
    """Read JSON, None if there is no such file. Raises LatentError if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LatentError(
            f"{path}: not JSON ({error}); delete it and run `python -m sfv_jax.prepare` as before"
        ) from error
