"""Versions of this package and of the packages on which results depend."""

from importlib.metadata import PackageNotFoundError, version

from sfv_jax import __version__


def package_versions(*names: str) -> dict[str, str]:
    """Returns `{package: version}` of sfv_jax and of the distributions `names`; "not installed" for absent ones.

    The version of sfv_jax comes from its source, so a checkout that was never installed has one too.
    """
    found = {"sfv_jax": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
