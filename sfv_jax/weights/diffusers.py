"""Strict reader and writer of weights in the diffusers folder layout, without torch.

Our parameter paths equal the keys of diffusers except for the last word: `kernel`, `scale` and `embedding` are all
`weight` in diffusers. Our kernels have their axes in the order of JAX, see `to_ours`.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.models import tree
from sfv_jax.runtime.files import write_json
from sfv_jax.weights.components import COMPONENTS, from_json, to_json
from sfv_jax.weights.folders import WeightsError, read_json, shape_problems
from sfv_jax.weights.lazy import Lazy, read_all
from sfv_jax.weights.reader import DTYPES, FLOATS, Tensors, open_weights
from sfv_jax.weights.writer import write_weights

# Permutation of a kernel's axes from torch's order to ours, by rank.
# Torch: Linear (o, i), Conv2d (o, i, h, w), Conv3d (o, i, k, 1, 1).
_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in VAEs before 2023


def their_name(path: str) -> str:
    """Converts a parameter path to the key of diffusers: `down_blocks.0.norm.scale` to `down_blocks.0.norm.weight`."""
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)


def to_ours(path: str, value: np.ndarray) -> np.ndarray:
    """Permutes the axes of a diffusers tensor to those of our parameter `path`.

    Kernels become Linear `[i, o]`, Conv2d `[h, w, i, o]` or Conv3d `[k, 1, 1, i, o]`; other tensors are unchanged.
    """
    return value.transpose(_AXES[value.ndim]) if path.endswith(".kernel") else value


def to_theirs(path: str, value: np.ndarray) -> np.ndarray:
    """Inverts `to_ours`."""
    return value.transpose(np.argsort(_AXES[value.ndim])) if path.endswith(".kernel") else value


def their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that `to_theirs` would give a parameter of `shape`."""
    return tuple(shape[axis] for axis in np.argsort(_AXES[len(shape)])) if path.endswith(".kernel") else tuple(shape)


@lru_cache(maxsize=16)
def manifest(component: str, config) -> dict[str, tuple[int, ...]]:
    """Returns `{name: shape}` of a diffusers weight file of this network. Callers must not change the cached dict.

    Raises:
      WeightsError: if the sizes of `config` contradict each other.
    """
    try:
        _, shapes = tree.abstract(COMPONENTS[component].module, config)
    except (ValueError, TypeError, ArithmeticError) as error:  # of the layers
        raise WeightsError(f"{component}: no network has the sizes of {config}: {error}") from error
    return {their_name(path): their_shape(path, x.shape) for path, x in tree.flatten(shapes).items()}


def find_weights(names: Iterable[str], stem: str, variant: str | None = None) -> list[str]:
    """Selects the weight files among the files of a component's folder: one file, or shards with their index first.

    Shards may have the variant before or after their number, and may lack an index. Safetensors are preferred to
    pickles.

    Args:
      names: names of the folder's files.
      stem: name up to the variant, as diffusers or transformers choose it.
      variant: the only variant to accept; None: plain files, else those of "fp16".
    Returns:
      File names; an empty list if there are no weight files.
    """
    names = sorted(names)
    pickled = "pytorch_model" if stem == "model" else stem  # the name in transformers
    for suffix, start in (("safetensors", stem), ("bin", pickled)):
        for word in [f".{variant}"] if variant else ["", ".fp16"]:
            if f"{start}{word}.{suffix}" in names:
                return [f"{start}{word}.{suffix}"]
            indices = f"{start}.{suffix}.index{word}.json", f"{start}{word}.{suffix}.index.json"
            number, before, after = r"-\d{5}-of-\d{5}", *map(re.escape, (f"{start}{word}", f"{word}.{suffix}"))
            shards = f"{before}{number}\\.{suffix}|{re.escape(start)}{number}{after}"
            found = [name for name in indices if name in names][:1]
            found += [name for name in names if re.fullmatch(shards, name)]
            if found:
                return found
    return []


def open_component(
    folder: str | Path, component: str, *, variant: str | None = None, allow_pickle: bool = False
) -> tuple[Tensors, object]:
    """Opens one network of a diffusers pipeline folder without reading its tensors.

    Args:
      folder: the component's own folder, with `config.json` and its weights in one or several files.
      component: "unet", "vae" or "image_encoder".
      variant: "fp16" to read those files even where plain ones exist.
      allow_pickle: accept `.bin` files where there are no safetensors.
    Returns:
      tensors: exactly the network's tensors, under the present names of diffusers.
      config: our config.
    Raises:
      WeightsError: if the config or the files are not exactly such a network; lists all tensors that do not fit.
    """
    folder = Path(folder)
    config = from_json(component, read_json(folder / "config.json"), str(folder / "config.json"))
    stem = COMPONENTS[component].weights
    names = find_weights((path.name for path in folder.iterdir()), stem, variant)
    if not names:
        wanted = ".".join(filter(None, (stem, variant, "safetensors")))
        raise WeightsError(f"{folder} holds no {wanted}, neither whole nor in shards")
    if names[0].endswith(".json"):
        names = names[:1]
    else:
        _refuse_incomplete(folder, names)
    tensors = open_weights([folder / name for name in names], allow_pickle)
    return fit(tensors, component, config, f"{tensors.where()} does not fit its config.json"), config


def _refuse_incomplete(folder: Path, names: list[str]) -> None:
    """Raises WeightsError unless shards without an index are numbered from the first to the last."""
    found = [re.search(r"-(\d{5})-of-(\d{5})", name) for name in names]
    numbers = [(int(match[1]), int(match[2])) for match in found if match]
    if numbers and numbers != [(n + 1, len(numbers)) for n in range(len(numbers))]:
        raise WeightsError(f"{folder} does not hold every shard once, only {', '.join(names)}")


def fit(tensors: Tensors, component: str, config, problem: str) -> Tensors:
    """Renames `tensors` to diffusers' present names and checks them against the network that `config` describes.

    Args:
      tensors: tensors under present or old names of diffusers.
      component: "unet", "vae" or "image_encoder".
      config: our config.
      problem: first line of the error message.
    Returns:
      The renamed tensors.
    Raises:
      WeightsError: if any tensor is missing, unexpected, misshapen, duplicate or non-floating; lists all of them.
    """
    names = [name for name in tensors.names() if not name.endswith(".position_ids")]
    stored = {modern_name(name): name for name in names}
    found = tensors.renamed(stored)
    problems = shape_problems({name: found.shape(name) for name in stored}, manifest(component, config))
    problems += [f"duplicate: {name}" for name in names if stored[modern_name(name)] != name]
    dtypes = {name: found.dtype(name) for name in stored}
    problems += [f"not floating point: {name} is {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    if problems:
        raise WeightsError(f"{problem}:\n  " + "\n  ".join(problems))
    return found


def lazy_params(tensors: Tensors, component: str, config, dtype=None) -> tree.Params:
    """Converts `tensors`, which `fit` accepted, to a nested dict of `Lazy` leaves in our layout.

    Args:
      tensors, component, config: as returned by and passed to `fit`.
      dtype: dtype of the leaves; None keeps that of the file.
    Returns:
      Nested dict of `Lazy` leaves. Reading one raises WeightsError if its values are NaN, infinite or outside the
      range of `dtype`.
    """

    def leaf(path: str, shape: tuple[int, ...]) -> Lazy:
        name = their_name(path)
        kind = np.dtype(DTYPES[tensors.dtype(name)] if dtype is None else dtype)
        return Lazy(shape, kind, lambda: to_ours(path, read_finite(tensors, name, kind)))

    _, shapes = tree.abstract(COMPONENTS[component].module, config)
    leaves: dict[str, Any] = {path: leaf(path, x.shape) for path, x in tree.flatten(shapes).items()}
    return tree.unflatten(leaves)


def read_finite(tensors: Tensors, name: str, dtype: np.dtype) -> np.ndarray:
    """Reads a tensor as `dtype`.

    Raises:
      WeightsError: if a value is NaN, infinite or outside the range of `dtype`.
    """
    value = tensors.read(name)
    if not np.isfinite(value).all():
        bad = (k for k in tensors.names() if not np.isfinite(tensors.read(k)).all())
        first = list(itertools.islice(bad, 5))
        raise WeightsError(f"{tensors.where()} holds NaN or infinite values, the first in {', '.join(first)}")
    with np.errstate(over="ignore"):  # reported below
        result = value.astype(dtype, copy=False)
    if dtype.itemsize < value.dtype.itemsize and not np.isfinite(result).all():
        raise WeightsError(f"{tensors.where()}: {name} has values that {dtype} cannot hold: choose another --dtype")
    return result


def load_component(folder: str | Path, component: str, *, variant: str | None = None, dtype=None):
    """Reads one network of a diffusers pipeline folder.

    Args:
      folder, component, variant: as for `open_component`.
      dtype: dtype of the arrays; None keeps that of the file.
    Returns:
      params: nested dict of numpy arrays in our layout.
      config: our config.
      files: the weight files that were read.
    Raises:
      WeightsError: if `open_component` refuses the folder, or values are NaN, infinite or outside the range of `dtype`.
    """
    tensors, config = open_component(folder, component, variant=variant)
    return read_all(lazy_params(tensors, component, config, dtype)), config, tensors.files


def modern_name(name: str) -> str:
    """Replaces the old names of VAE attentions (`query`, `key`, `value`, `proj_attn`) by the present ones."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", name
    )


def save_component(
    folder: str | Path,
    component: str,
    params: tree.Params,
    config,
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Writes one network in the diffusers layout: `config.json` and its weights.

    Tensors are read and written one by one: besides `params`, memory holds at most one tensor.

    Args:
      folder: the component's folder, created if missing.
      component: "unet", "vae" or "image_encoder".
      params: nested dict of arrays, readable from this process, of any floating dtype.
      config: our config.
      variant: "fp16" to write fp16 files with that suffix; None writes fp32.
      max_shard_size: bytes or text such as "10GB"; larger weights are split into shards with an index, as
        `save_pretrained` does.
    Raises:
      WeightsError: if diffusers cannot express the config, `params` are not such a network, or fp16 cannot hold them.
    """
    folder = Path(folder)
    description, shapes, read = to_json(component, config), *reader(component, params, config)
    dtype = np.dtype(np.float16 if variant == "fp16" else np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = {name: shapes[name] for name in sorted(shapes)}
    tensors = ((name, read(name)) for name in ordered)
    stem = COMPONENTS[component].weights
    write_weights(folder, stem, ordered, tensors, dtype, variant=variant, max_shard_size=max_shard_size)
    write_json(folder / "config.json", description)


def reader(component: str, params: tree.Params, config) -> tuple[dict, Callable[[str], np.ndarray]]:
    """Presents our parameters under diffusers' names.

    Args:
      component: "unet", "vae" or "image_encoder".
      params: nested dict of arrays in our layout.
      config: our config.
    Returns:
      shapes: `{name: shape}` in the layout of diffusers.
      read: function from a name to its tensor as a numpy array in the layout of diffusers.
    Raises:
      WeightsError: if `params` are not the network that `config` describes.
    """
    flat = tree.flatten(params)
    paths = {their_name(path): path for path in flat}
    shapes = {name: their_shape(path, flat[path].shape) for name, path in paths.items()}
    problems = shape_problems(shapes, manifest(component, config))
    if problems:
        raise WeightsError(f"{component}: the parameters do not fit the config:\n  " + "\n  ".join(problems))
    return shapes, lambda name: to_theirs(paths[name], np.asarray(flat[paths[name]]))
