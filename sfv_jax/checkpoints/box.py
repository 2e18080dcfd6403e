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
        "fingerprints.json": "da0430f291fa9c827c85af22111895c63ae11f4c69a3910ed32e9badd1f535ad",
        "model.json": "f94df4cc63ce8690096d1d20fa77a3b24de11fceac4b0ec0931a292ff68f34ff",
        "unet.safetensors": "b2d31c27459362c47ee8bee233cbafb272a8d441639677fb1e25dc55bdc638ae",
    },
    "world-teacher": {
        "fingerprints.json": "3e24f9a66ab7e1e9b55f579f41addb388ec52262ad1a7935b3fae2ba2dbe90ac",
        "model.json": "13d2a491e5f4be00a7084917a09dc7b9089e253e77276642557137742d15a644",
        "unet.safetensors": "a6a450d7c300e5e515eae85a139f2edae9a795efa93e268dff2c760791c19cf2",
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
