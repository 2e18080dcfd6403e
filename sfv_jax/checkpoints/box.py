"""Models in the package, small enough to come with it: those of the procedural world (docs/world.md).

Each is a packed model folder below `sfv_jax/box`, named by `NAMES` wherever a command takes a model folder. Their files
are verified by SHA-256 when they are first used in a process.
"""

import functools
from pathlib import Path

from sfv_jax.runtime.files import sha256
from sfv_jax.weights.folders import WeightsError

ROOT = Path(__file__).parent.parent / "box"
NAMES: dict[str, dict[str, str]] = {  # {name: {file: SHA-256}}
    "world": {
        "fingerprints.json": "af5b96e2b70fb096e8f61933d9a81c43f620e439a31ca0e3dd34a4e2fde589dc",
        "model.json": "2b81c8dce11a3e8c783af6318123d3f15e1fda375fd4e3ba4d6c0f9a6e63fbd5",
        "unet.safetensors": "70be63da93cd90acedbb3f78db18c781f011014d2bb459ec9e5b3b28b4461794",
    },
    "world-teacher": {
        "fingerprints.json": "c670c8ec576e9f25548adc2e90047f9497ac2be0bf126e2f068eddccf5167c09",
        "model.json": "44e3b2ebe32358913c57d31bf6b1400d7d2de73f74a239c3bd8a919a2b2e86b3",
        "unet.safetensors": "063f7f525dfbe71010c7c25a3c119a6d1ff0788e4c6d4bdf53f070836e9ab9f7",
    },
    "world-decoder": {
        "fingerprints.json": "dba3d013cb2b288cf6eb1f4175510381e6b55bcc99c65d188b8414b7eceb2687",
        "model.json": "9246661f525d2512c21592af87b0b1623982904e1ea04de43b9e0d443983d7b1",
        "tiny_decoder.safetensors": "27d93a8e3bf13fa947da2e98be849f8b61f28b6e04c78c302ef15943d3366961",
    },
    "world-encoders": {
        "fingerprints.json": "e4a82f87f8dd577589f7cd1cd58b59d7259d9f61ae634997af57175584df3f1c",
        "image_encoder.safetensors": "207441a1f3bef6f3990a0a9fc7b27badced27cc1b8077163aa7c6abc4295b727",
        "model.json": "e6c8aead14c4fd5d53ba1cf3e0978da70982448d9346b62bf1453284bcf20838",
        "vae.safetensors": "f901248995add55b6a2c6899459efbac5aea7c49777a3ba420b115e208ae404c",
    },
}
DECODERS = {"world-encoders": "world-decoder"}  # {VAE and CLIP tower: the tiny decoder of their latents}


@functools.cache
def folder(name: str) -> Path:
    """Returns the folder of a model of `NAMES`.

    Raises:
      WeightsError: if a file is missing or is not the one that was published.
    """
    place = ROOT / name
    for file, digest in NAMES[name].items():
        path = place / file
        if not path.is_file():
            raise WeightsError(f"{path} is missing: this installation came without the model {name!r}; install it anew")
        if sha256(path) != digest:
            raise WeightsError(f"{path} is not the published file (its SHA-256 differs): install the package anew")
    return place


def located(path: str | Path) -> Path:
    """Returns `path`, or the folder in the package if it is the name of a model there and nothing else has that name.

    Raises:
      WeightsError: as `folder`.
    """
    return folder(str(path)) if str(path) in NAMES and not Path(path).exists() else Path(path)


def name_of(path: Path) -> str | None:
    """Returns the name of the model whose folder in the package is `path`; None for other folders."""
    return path.name if path.parent == ROOT and path.name in NAMES else None


def decoder_of(path: Path) -> Path | None:
    """Returns the folder of the tiny decoder in the package for the encoders in `path`; None if there is none.

    Raises:
      WeightsError: as `folder`.
    """
    name = DECODERS.get(name_of(path) or "")
    return folder(name) if name in NAMES else None
