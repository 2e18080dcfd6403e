"""Models in the package, small enough to come with it: the world's one-step generator and its teacher.

Each is a packed model folder below `sfv_jax/box`, named by `NAMES` wherever a command takes a model folder. Their files
are verified by SHA-256 when they are first used in a process.
"""

import functools
from pathlib import Path

from sfv_jax.runtime.files import sha256
from sfv_jax.weights.folders import WeightsError

ROOT = Path(__file__).parent.parent / "box"
NAMES: dict[str, dict[str, str]] = {  # {name: {file: SHA-256}}; launch/box.sh prints them
}


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


def name_of(path: Path) -> str | None:
    """Returns the name of the model whose folder in the package is `path`; None for other folders."""
    return path.name if path.parent == ROOT and path.name in NAMES else None
