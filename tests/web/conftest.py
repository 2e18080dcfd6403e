"""Small models behind a page."""

import pytest

from sfv_jax.web import models
from tests.support.small_model import save_world_model


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A model folder of the procedural world with random weights."""
    return save_world_model(tmp_path_factory.mktemp("web") / "small")


@pytest.fixture(scope="session")
def small(small_folder):
    """The models of a page: `small_folder`, compared with another one."""
    other = save_world_model(small_folder.parent / "other", seed=1)
    return models.make(models.load(str(small_folder)), models.load(str(other)))
