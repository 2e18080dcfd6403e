"""Stability's single file of all three networks, in and out (names: `sgm`), every tensor accounted for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sfv_jax.models import tree
from sfv_jax.weights import sgm
from sfv_jax.weights.configs import COMPONENTS, to_json
from sfv_jax.weights.diffusers import reader
from sfv_jax.weights.folders import WeightsError, refuse_existing
from sfv_jax.weights.stream import Shapes, write_safetensors

# What no shape tells, kept in the header of the files we write.
UNTOLD = {
    "unet": ("num_attention_heads", "num_frames", "sample_size"),
    "vae": ("scaling_factor", "sample_size"),
    "image_encoder": ("num_attention_heads",),
}
HEAD_DIM = {"unet": 64, "image_encoder": 80}  # of SVD, where the header does not say how many heads there are
# Tensors of a file that no network of ours has, with the reason that goes into the report.
IGNORED = {
    r"conditioner\.embedders\.0\.open_clip\.(?!model\.visual\.)": "CLIP's text side",
    r"conditioner\.embedders\.3\.encoder\.(decoder|post_quant_conv)\.": "the conditioner's decoder",
    r"(first_stage_model|conditioner\.embedders\.3\.encoder)\.(loss|model_ema)\.": "training state of the VAE",
    r"model_ema\.": "moving average of the training, beside the weights themselves",
    r"denoiser\.sigmas$": "table of noise levels",
}


def is_single_file(names) -> bool:
    """Whether these are names of tensors of such a file."""
    return any(name.startswith(sgm.UNET) for name in names)


def save_single_file(
    path: str | Path,
    load: Callable[[str], tree.Params],
    configs: dict,
    *,
    variant: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one file with the names of the original, complete or not at all.

    Args:
      path: ending in `.safetensors`.
      load: gives the parameters of a component by name; called once for each, so that only one is held at a time.
      configs: of all three components.
      variant: "fp16" for half precision, None for fp32.
    Raises:
      WeightsError: if the file exists, its name ends otherwise, or the networks are none that this format can express.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: the name of a single file must end in .safetensors")
    refuse_existing(path, overwrite)
    for name in COMPONENTS:
        to_json(name, configs[name])  # the same limits as diffusers has
    shapes: Shapes = {}
    for name in COMPONENTS:
        for where in _parts(name, configs[name]):
            shapes |= sgm.shapes_there(name, configs[name], where)
    tensors = (pair for name in COMPONENTS for pair in _tensors(name, load(name), configs[name]))
    untold = {name: {field: getattr(configs[name], field) for field in UNTOLD[name]} for name in COMPONENTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.float16 if variant == "fp16" else np.float32)
    write_safetensors(path, shapes, tensors, dtype, {"sfv_jax": json.dumps(untold)})


def _parts(component: str, config) -> list[dict[str, sgm.Place]]:
    """The places of a component, and for the VAE those of the encoder's copy."""
    where = sgm.places(component, config)
    if component != "vae":
        return [where]
    copy = sgm.places(component, config, first_stage_encoder=True)
    return [where, {name: place for name, place in copy.items() if name.startswith("encoder.")}]


def _tensors(component: str, params: tree.Params, config) -> Iterator[tuple[str, np.ndarray]]:
    _, read = reader(component, params, config)
    for n, where in enumerate(_parts(component, config)):
        yield from sgm.from_diffusers(where, read if n == 0 else lambda name: _without_quant_conv(name, read))


def _without_quant_conv(name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Tensor `name` of an encoder whose last convolution does the work of `quant_conv` too."""
    value = read(name)
    if not name.startswith("encoder.conv_out."):
        return value
    mix = read("quant_conv.weight")[:, :, 0, 0].astype(np.float64)
    product = np.tensordot(mix, value.astype(np.float64), axes=1)
    return (product + read("quant_conv.bias") if name.endswith(".bias") else product).astype(np.float32)
