"""Weights in the diffusers folder layout, in and out: same names, other leaves, strict both ways, without torch.

A parameter path of ours is a diffusers key but for the last word: `kernel`, `scale` and `embedding` are all `weight`
there. Kernels are stored with their axes in the order of JAX, see `to_ours`.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from sfv_jax.models import tree
from sfv_jax.runtime.files import write_json
from sfv_jax.weights.components import COMPONENTS, from_json, to_json
from sfv_jax.weights.folders import WeightsError, read_json, shape_problems
from sfv_jax.weights.lazy import Lazy, read_all
from sfv_jax.weights.reader import DTYPES, FLOATS, Tensors, open_weights
from sfv_jax.weights.writer import write_weights

# Axes of a kernel in torch's order -> in ours, by rank: Linear (o, i), Conv2d (o, i, h, w), Conv3d (o, i, k, 1, 1).
_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # VAEs before 2023


def their_name(path: str) -> str:
    """`down_blocks.0.norm.scale -> down_blocks.0.norm.weight`."""
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)


def to_ours(path: str, value: np.ndarray) -> np.ndarray:
    """A tensor of theirs as our parameter `path`: Linear `[i, o]`, Conv2d `[h, w, i, o]`, Conv3d `[k, 1, 1, i, o]`."""
    return value.transpose(_AXES[value.ndim]) if path.endswith(".kernel") else value


def to_theirs(path: str, value: np.ndarray) -> np.ndarray:
    """Inverse of `to_ours`."""
    return value.transpose(np.argsort(_AXES[value.ndim])) if path.endswith(".kernel") else value


def their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `to_theirs` without an array."""
    return tuple(shape[axis] for axis in np.argsort(_AXES[len(shape)])) if path.endswith(".kernel") else tuple(shape)


@lru_cache(maxsize=16)
def manifest(component: str, config) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a diffusers weight file of this network holds. Not to be changed by the caller."""
    _, shapes = tree.abstract(COMPONENTS[component].module, config)
    return {their_name(path): their_shape(path, x.shape) for path, x in tree.flatten(shapes).items()}


def find_weights(names: Iterable[str], stem: str, variant: str | None = None) -> list[str]:
    """The weight files among the files of a component's folder: one file, or shards with their index first.

    Shards may have the variant before or after their number, and lack an index. Safetensors come before pickles.

    Args:
      stem: name up to the variant, as diffusers or transformers choose it.
      variant: only of this variant; None: the plain ones, else those of "fp16".
    Returns:
      Names, empty if there are none.
    """
    names = sorted(names)
    pickled = "pytorch_model" if stem == "model" else stem  # as transformers calls it
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
    """One network of a diffusers pipeline folder, not yet read.

    Args:
      folder: the component's own folder, with `config.json` and its weights in one or several files.
      component: "unet", "vae" or "image_encoder".
      variant: "fp16" to read those files even if plain ones lie beside them.
      allow_pickle: take `.bin` files where there are no safetensors.
    Returns:
      tensors: by the present names of diffusers, all of them and no others.
      config: our config.
    Raises:
      WeightsError: for a config or files that are not exactly such a network; lists all tensors that do not fit.
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
    """Shards without an index: from the first to the last."""
    found = [re.search(r"-(\d{5})-of-(\d{5})", name) for name in names]
    numbers = [(int(match[1]), int(match[2])) for match in found if match]
    if numbers and numbers != [(n + 1, len(numbers)) for n in range(len(numbers))]:
        raise WeightsError(f"{folder} does not hold every shard once, only {', '.join(names)}")


def fit(tensors: Tensors, component: str, config, problem: str) -> Tensors:
    """`tensors` by diffusers' present names, if they are exactly those of the network that `config` describes.

    Raises:
      WeightsError: beginning with `problem`, then listing every missing, unexpected, misshapen, duplicate or
        non-floating tensor.
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
    """`tensors`, which `fit` accepted, as a nested dict of `Lazy` leaves in our layout.

    Args:
      dtype: what to cast to; None keeps the file's.
    Raises:
      WeightsError: when a leaf is read that holds NaN or infinite values, or values that `dtype` cannot hold.
    """

    def leaf(path: str, shape: tuple[int, ...]) -> Lazy:
        name = their_name(path)
        kind = np.dtype(DTYPES[tensors.dtype(name)] if dtype is None else dtype)
        return Lazy(shape, kind, lambda: to_ours(path, _read(tensors, name, kind)))

    _, shapes = tree.abstract(COMPONENTS[component].module, config)
    return tree.unflatten({path: leaf(path, x.shape) for path, x in tree.flatten(shapes).items()})


def _read(tensors: Tensors, name: str, dtype: np.dtype) -> np.ndarray:
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
      folder, component, variant: as in `open_component`.
      dtype: what to cast to; None keeps the file's.
    Returns:
      params: nested dict of numpy arrays in our layout.
      config: our config.
      files: the weight files that were read.
    Raises:
      WeightsError: as `open_component` and `lazy_params`.
    """
    tensors, config = open_component(folder, component, variant=variant)
    return read_all(lazy_params(tensors, component, config, dtype)), config, tensors.files


def modern_name(name: str) -> str:
    """The present name of a tensor: VAE attentions were once `query`, `key`, `value`, `proj_attn`."""
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
    """Writes one network as diffusers does: `config.json` and its weights, fp16 for variant "fp16", else fp32.

    Tensors are read and written one by one; beside `params` only the largest is held in memory.

    Args:
      params: nested dict of arrays, readable from this process, of any floating dtype.
      max_shard_size: larger weights are cut into shards with an index, as `save_pretrained` does.
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
    """`(shapes, read)` of our parameters under diffusers' names: what there is, and how to get one as numpy array.

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
