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
        "fingerprints.json": "420b096944cbf8637e7795046248dad382d77a084f17ccb9a1ff0a709d62ce72",
        "model.json": "aa194c308735b0d3fd7259a33e5aad1a975f889b09e72242e566aef0c4d60557",
        "unet.safetensors": "a38c6c1a5c1359632a58ada39a81325cf9a44dbe9083c575f826032612b69a95",
    },
    "world-teacher": {
        "fingerprints.json": "3885aa17b0d6ee2a58c71aaf3d142f8e1a5e3318b96e5392037b4a3a33d69b5c",
        "model.json": "ae17f1d0d3632786ead4a8174c8c15429b23929281ec5378f0868ca7b48994f1",
        "unet.safetensors": "aa9fd9f98c850c4a9f5992117589413a168c2d4ee14bca7a9dc758cf5d3a7350",
    },
    "world-encoders": {
        "fingerprints.json": "648052ae95b9c323ba06b700f72448fc43fe8658d4de79ac5d48fe6eb645a1df",
        "image_encoder.safetensors": "207441a1f3bef6f3990a0a9fc7b27badced27cc1b8077163aa7c6abc4295b727",
        "model.json": "f3128a16b069550d1d294e14325197217bfe6c782f098e3d76991063053bb4a0",
        "vae.safetensors": "a3878412f2906fec5c61d5b5bb83f39cdce4d157e9f30b974baecb5eb2d80594",
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
