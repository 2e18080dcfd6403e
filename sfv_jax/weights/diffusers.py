"""Weights in the diffusers folder layout, in and out: same names, other leaves, strict both ways, without torch.

A parameter path of ours is a diffusers key but for the last word: `kernel`, `scale` and `embedding` are all `weight`
there. Kernels are stored with their axes in the order of JAX, see `to_ours`.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sfv_jax.models import tree
from sfv_jax.weights.configs import COMPONENTS, from_json, to_json
from sfv_jax.weights.folders import WeightsError, read_json, shape_problems, write_json
from sfv_jax.weights.stream import write_weights

# Axes of a kernel in torch's order -> in ours, by rank: Linear (o, i), Conv2d (o, i, h, w), Conv3d (o, i, k, 1, 1).
_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
_FLOATS = {"F64", "F32", "F16", "BF16"}
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


def weight_file(folder: Path, stem: str, variant: str | None = None) -> Path:
    """The safetensors file of a component: of `variant` if named, else the plain one, else the fp16 one.

    Raises:
      WeightsError: if there is none, saying what was looked for.
    """
    variants = [variant] if variant else [None, "fp16"]
    names = [".".join(filter(None, (stem, v, "safetensors"))) for v in variants]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder} holds no {' or '.join(names)}")


def load_component(folder: str | Path, component: str, *, variant: str | None = None, dtype=None):
    """Reads one network of a diffusers pipeline folder.

    Args:
      folder: the component's own folder, with `config.json` and a safetensors file.
      component: "unet", "vae" or "image_encoder".
      variant: "fp16" to read that file even if a plain one lies beside it.
      dtype: what to cast to; None keeps the file's.
    Returns:
      params: nested dict of numpy arrays in our layout.
      config: our config.
      path: the weight file that was read.
    Raises:
      WeightsError: for a config or a file that is not exactly such a network; lists all tensors that do not fit.
    """
    folder = Path(folder)
    config = from_json(component, read_json(folder / "config.json"), str(folder / "config.json"))
    path = weight_file(folder, COMPONENTS[component].weights, variant)
    _, shapes = tree.abstract(COMPONENTS[component].module, config)
    try:
        with safe_open(path, framework="np") as file:
            return read_tensors(file, shapes, str(path), dtype), config, path
    except SafetensorError as error:
        raise WeightsError(f"{path} is cut short or not a safetensors file ({error})") from error


def read_tensors(file, shapes: tree.Params, where: str, dtype=None) -> tree.Params:
    """Parameters like `shapes` out of an open safetensors file, one tensor in memory at a time besides the result.

    Raises:
      WeightsError: listing every missing, unexpected, misshapen, duplicate or non-floating tensor.
    """
    ours = {their_name(path): (path, their_shape(path, x.shape)) for path, x in tree.flatten(shapes).items()}
    names = [name for name in file.keys() if not name.endswith(".position_ids")]
    stored = {modern_name(name): name for name in names}
    slices = {name: file.get_slice(old) for name, old in stored.items()}
    problems = shape_problems(
        {name: tuple(x.get_shape()) for name, x in slices.items()}, {name: shape for name, (_, shape) in ours.items()}
    )
    dtypes = {name: x.get_dtype() for name, x in slices.items()}
    problems += [f"duplicate: {name}" for name in names if stored[modern_name(name)] != name]
    problems += [f"not floating point: {name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    if problems:
        raise WeightsError(f"{where} does not fit its config.json:\n  " + "\n  ".join(problems))
    flat = {}
    for name, (path, _) in ours.items():
        value = to_ours(path, file.get_tensor(stored[name]))
        flat[path] = value if dtype is None else value.astype(dtype)
    return tree.unflatten(flat)


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
