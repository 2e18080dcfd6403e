"""Latent cache: outputs of the frozen encoders for each clip, computed once, in ArrayRecord shards that TFDS reads.

A folder contains `latents-SPLIT.array_record-IIIII-of-NNNNN` shards, `manifest.json` (the settings that made them) and
the TFDS metadata. Metadata is written last, so a folder with metadata is complete. One record, channels last:

  latents            float16 [t, h, w, c]  posterior means, unscaled
  cond_latent        float16 [h, w, c]     mean of the noise-augmented first frame, unscaled; not latents[0]
  image_embed        float16 [d]           CLIP embedding of the first frame
  fps, motion_bucket_id, noise_aug_strength  float32, as given to `prepare`
  key, source, start                       name of the clip, its file, and its beginning in the file in seconds
  schema                                   int32, version of this layout

float16 has 3 digits of precision for the means and loads without TensorFlow, which TFDS needs for bfloat16.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from sfv_jax.errors import UserError
from sfv_jax.runtime import files
from sfv_jax.runtime.files import FileError, replacing

SCHEMA = 1
NAME = "latents"
MANIFEST = "manifest.json"
ARRAYS = ("latents", "cond_latent", "image_embed")


class LatentError(UserError):
    """Unusable cache or record; the message names it and the cause."""


def features(shapes: Mapping[str, Iterable[int]]) -> tfds.features.FeaturesDict:
    """Returns the TFDS schema of a record whose arrays (see `ARRAYS`) have these shapes."""
    # Encoded as bytes: the default encoding stores float16 as a list of float32.
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
    """Returns the shapes of a record's arrays by name."""
    return {name: list(np.shape(record[name])) for name in ARRAYS}


def to_float16(key: str, name: str, values: np.ndarray) -> np.ndarray:
    """Casts array `name` of clip `key` to float16.

    Raises:
      LatentError: if a value is NaN, infinite or beyond the range of float16.
    """
    with np.errstate(over="ignore"):
        half = np.asarray(values).astype(np.float16)
    bad = half.size - np.count_nonzero(np.isfinite(half))
    if bad:
        raise LatentError(f"clip {key}: {bad} of {half.size} values of {name} are NaN or beyond float16")
    return half


def shard_path(folder: str | os.PathLike, split: str, index: int, total: int) -> Path:
    """Returns the path of shard `index` of the `total` shards of `split`."""
    return Path(folder) / f"{NAME}-{split}.array_record-{index:05d}-of-{total:05d}"


def write_shard(path: Path, records: Iterable[dict]) -> tuple[int, dict[str, list[int]]]:
    """Writes one shard, complete or not at all.

    Args:
      path: the final name, from `shard_path`.
      records: dicts with the keys of `features`; arrays from `to_float16`.
    Returns:
      count: number of records.
      shapes: shapes of a record's arrays by name; `{}` for a shard without records.
    Raises:
      LatentError: if shapes differ between records.
    """
    count, schema = 0, None
    shapes: dict[str, list[int]] = {}
    for abandoned in path.parent.glob(f".{path.name}.*.tmp"):  # by a killed run
        abandoned.unlink()
    with replacing(path) as temporary:
        # One uncompressed record per group: fastest in random order, and latents hardly compress.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for record in records:
                if schema is None:
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
    """Serializes a record deterministically: the order of its fields differs between processes."""
    # Protobuf defines the class at import.
    message = tf_example_pb2.Example.FromString(example)  # pyrefly: ignore[missing-attribute]
    return message.SerializeToString(deterministic=True)


def count_records(path: Path) -> int:
    """Returns the number of records in a shard; -1 if the file is missing or cannot be read."""
    if not path.is_file():
        return -1
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except RuntimeError:  # the library's exception for a truncated file
        return -1
    return count


def write_metadata(
    folder: str | os.PathLike, shapes: Mapping[str, Iterable[int]], counts: dict[str, list[int]]
) -> None:
    """Completes a cache: afterwards TFDS and `loader.latent_source` accept the folder.

    Args:
      folder: folder of all shards.
      shapes: shapes of the arrays by name.
      counts: number of records in each shard of each split, in order.
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


def read_json(path: Path, fields: Iterable[str] = ()) -> dict | None:
    """Reads a JSON object that has these fields; returns None if the file is missing.

    Raises:
      LatentError: if the file has anything else.
    """
    if not path.exists():
        return None
    try:
        remedy = "delete it and run `python -m sfv_jax.prepare` as before"
        return files.read_json(path, remedy, fields, files.MAX_LIST)
    except FileError as error:
        raise LatentError(str(error)) from error
