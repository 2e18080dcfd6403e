"""Features of videos for FVD: I3D from a file the user has.

Three kinds of file are read:

  - the TorchScript `i3d_torchscript.pt` that StyleGAN-V's authors distribute, made from the original TF-Hub module; it
    is run by torch as it is, with its own rescaling and resizing;
  - a state dict of the PyTorch port `InceptionI3d`, such as `i3d_pretrained_400.pt` of VideoGPT or `rgb_imagenet.pt`;
  - a safetensors file that `convert` wrote from such a state dict; it needs no torch.

The files are different ports with different scores, so every description carries the SHA-256 of the file.

    python -m sfv_jax.evaluation.fvd --src i3d_pretrained_400.pt --dst i3d.safetensors

converts a state dict, for machines without torch.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from sfv_jax.models import tree
from sfv_jax.models.i3d import I3D, I3DConfig, preprocess
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import sha256
from sfv_jax.weights.diffusers import their_shape, to_ours, to_theirs
from sfv_jax.weights.folders import WeightsError, shape_problems
from sfv_jax.weights.reader import open_weights
from sfv_jax.weights.writer import write_safetensors

Features = Callable[[np.ndarray], np.ndarray]  # uint8 [b, t, h, w, 3] -> float32 [b, d]

WHERE = (
    "FVD needs I3D weights (Kinetics-400), which are not part of this program: name a file with --i3d. Known files: "
    "i3d_torchscript.pt, described in the README of StyleGAN-V (github.com/universome/stylegan-v), and "
    "i3d_pretrained_400.pt, described in that of VideoGPT (github.com/wilson1yan/VideoGPT)"
)
_LEAVES = {
    "conv3d.kernel": "conv3d.weight",
    "conv3d.bias": "conv3d.bias",
    "bn.scale": "bn.weight",
    "bn.bias": "bn.bias",
    "bn.mean": "bn.running_mean",
    "bn.var": "bn.running_var",
}


def load_i3d(path: str | Path | None, *, batch_norm_eps: float | None = None) -> tuple[Features, dict]:
    """(features, description) of an I3D file.

    Args:
      batch_norm_eps: of a state dict, which does not tell: 1e-3 (TensorFlow's and the first port's, the default) or
        1e-5 (ports that kept PyTorch's).
    Returns:
      features: uint8 `[b, t, h, w, 3]`, t >= 9, to fp32 logits `[b, 400]`.
      description: `file`, `sha256`, `kind`, and what else decides the numbers.
    Raises:
      WeightsError: if there is no such file or it is none of the three kinds.
    """
    if not path:
        raise WeightsError(WHERE)
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist. {WHERE}")
    about = {"file": path.name, "sha256": sha256(path)}
    if _is_torchscript(path):
        return _torchscript(path), about | {"kind": "TorchScript", "resize": "its own"}
    params, config, origin = read_i3d(path, batch_norm_eps)
    graph, _ = tree.abstract(I3D, config)
    logits = jax.jit(lambda params, frames: tree.build(graph, params)(preprocess(frames)))
    about |= {"kind": "state dict", "batch_norm_eps": config.batch_norm_eps, "resize": "bilinear, no antialias"}
    return lambda frames: np.asarray(logits(params, frames)), about | origin


def read_i3d(path: Path, batch_norm_eps: float | None = None) -> tuple[tree.Params, I3DConfig, dict]:
    """(parameters, config, what is known of the origin) of a state dict or of a file written by `convert`."""
    tensors = open_weights(path, allow_pickle=True)  # by torch's weights_only reader, which runs no code
    told = json.loads(tensors.metadata.get("i3d", "{}"))
    stored = told.pop("batch_norm_eps", None)
    if stored and batch_norm_eps and stored != batch_norm_eps:
        raise WeightsError(f"{path} was converted with batch_norm_eps {stored}, not {batch_norm_eps}")
    config = I3DConfig(batch_norm_eps=batch_norm_eps or stored or 1e-3)
    expected = _expected(config)
    found = {k: tensors.shape(k) for k in tensors.names() if not k.endswith("num_batches_tracked")}
    problems = shape_problems(found, {name: shape for name, (_, shape) in expected.items()})
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsError(f"{path} is not a state dict of InceptionI3d:\n  " + "\n  ".join(problems[:10]) + more)
    flat = {ours: to_ours(ours, tensors.read(name).astype(np.float32)) for name, (ours, _) in expected.items()}
    return tree.unflatten(flat), config, told


def convert(src: str | Path, dst: str | Path, *, batch_norm_eps: float | None = None) -> None:
    """Writes a state dict as safetensors, with its SHA-256 and epsilon in the header.

    Raises:
      WeightsError: if `src` is not a state dict of InceptionI3d (TorchScript is used as it is), or `dst` exists.
    """
    src, dst = Path(src), Path(dst)
    if dst.exists():
        raise WeightsError(f"{dst} exists already: choose another destination")
    if _is_torchscript(src):
        raise WeightsError(f"{src} is TorchScript, which carries its own network: pass it as --i3d")
    params, config, _ = read_i3d(src, batch_norm_eps)
    flat = tree.flatten(params)
    expected = _expected(config)
    tensors = ((name, to_theirs(ours, np.asarray(flat[ours]))) for name, (ours, _) in expected.items())
    about = {"batch_norm_eps": config.batch_norm_eps, "source": {"file": src.name, "sha256": sha256(src)}}
    shapes = {name: shape for name, (_, shape) in expected.items()}
    write_safetensors(dst, shapes, tensors, np.dtype(np.float32), {"i3d": json.dumps(about)})


def _expected(config: I3DConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{their name: (our path, their shape)}."""
    _, shapes = tree.abstract(I3D, config)
    names = {}
    for path, x in tree.flatten(shapes).items():
        module, *leaf = path.rsplit(".", 2)
        names[f"{module}.{_LEAVES['.'.join(leaf)]}"] = path, their_shape(path, x.shape)
    return names


def _is_torchscript(path: Path) -> bool:
    """TorchScript archives hold code beside the tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _torchscript(path: Path) -> Features:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path} is TorchScript and needs torch: pip install torch, or use a state dict") from error
    module = torch.jit.load(str(path), map_location="cpu").eval()

    def features(frames: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(frames), -1, 1)))
        with torch.no_grad():
            return module(x, rescale=True, resize=True, return_features=True).float().numpy()

    return features


FLAGS = flags.FLAGS


def main() -> None:
    convert(FLAGS.src, FLAGS.dst, batch_norm_eps=FLAGS.batch_norm_eps)
    print(f"wrote {FLAGS.dst}; name it with --i3d")


def define_flags() -> None:
    flags.DEFINE_string("src", None, "state dict of InceptionI3d", required=True)
    flags.DEFINE_string("dst", None, "safetensors file to write", required=True)
    flags.DEFINE_float("batch_norm_eps", None, "which port: 1e-3 (default) or 1e-5")


if __name__ == "__main__":
    commands.run(main, define_flags)
