"""Random I3D weights in the published form, a PyTorch state dict.

python -m tests.support.random_i3d i3d.pt
"""

import sys
from pathlib import Path

import numpy as np
import torch

from sfv_jax.models import i3d, tree


def weights() -> dict[str, np.ndarray]:
    """Draws weights by our paths; kernels preserve the variance of their input, statistics are not trivial."""
    rng = np.random.default_rng(0)
    _, shapes = tree.abstract(i3d.I3D, i3d.I3DConfig())
    flat = {}
    for path, x in tree.flatten(shapes).items():
        noise = rng.standard_normal(x.shape)
        if path.endswith("kernel"):
            noise *= np.sqrt(2 / np.prod(x.shape[:-1]))
        elif path.endswith(("scale", "var")):
            noise = 1 + 0.2 * np.abs(noise)
        else:
            noise *= 0.1
        flat[path] = noise.astype(np.float32)
    return flat


def save(path: str | Path, weights: dict[str, np.ndarray]) -> None:
    """Writes `weights`, named by our paths, with the names and axes of the state dict."""
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var", "bias": "bias"}
    content = {"Conv3d_1a_7x7.bn.num_batches_tracked": torch.tensor(7)}
    for name, value in weights.items():
        module, leaf = name.rsplit(".", 1)
        value = torch.from_numpy(value)
        content[f"{module}.{leaves[leaf]}"] = value.permute(4, 3, 0, 1, 2) if value.ndim == 5 else value
    torch.save(content, path)


if __name__ == "__main__":
    save(sys.argv[1], weights())
