"""Package versions, also from a checkout that was never installed."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import sfv_jax
from sfv_jax.runtime.versions import package_versions

ABSENT = """
from importlib import metadata
found = metadata.distribution

def without_us(name):
    if name == "sfv_jax":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.distribution = without_us
from sfv_jax.runtime.versions import package_versions
print(package_versions("numpy", "sfv_jax-that-never-was"))
"""


def test_versions_without_an_installed_package():
    """Hides the distribution, as after `pip install -r requirements.txt` in a checkout."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", ABSENT], cwd=root, capture_output=True, text=True, check=True)
    wanted = {"sfv_jax": sfv_jax.__version__, "numpy": metadata.version("numpy")}
    assert done.stdout.strip() == str(wanted | {"sfv_jax-that-never-was": "not installed"})


def test_the_version_of_the_source_is_that_of_the_distribution():
    assert package_versions() == {"sfv_jax": sfv_jax.__version__}
    for distribution in metadata.distributions(name="sfv_jax"):
        assert distribution.version == sfv_jax.__version__
