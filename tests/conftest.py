"""Fixtures shared by all tests: small networks with random weights, as the torch reference, on disk, and as ours.

Without torch all tests run but those that compare with torch live; the golden files stand for it in the others.
"""

import functools
import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from sfv_jax.models import tree
from sfv_jax.runtime import compilation, sharding
from sfv_jax.training import loop, previews, step
from tests.support import golden
from tests.support.golden import CONFIGS, error, noise

ROOT = Path(__file__).parents[1]
CACHE_LIMIT = 2 * 2**30  # bytes; a larger cache of compiled programs is begun anew


def compiled_programs() -> str:
    """Returns the folder of compiled programs, which workers, commands that tests start, and later sessions share."""
    folder = ROOT / ".pytest_cache" / "compiled" / compilation.cache_folder().name
    if "PYTEST_XDIST_WORKER" not in os.environ and folder.is_dir():
        if sum(file.stat().st_size for file in folder.iterdir()) > CACHE_LIMIT:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": compiled_programs(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # commands that start compile a hundred small programs
    }
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling costs more than running
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)  # meshes of several devices on any machine
jax.config.update("jax_default_matmul_precision", "highest")

__all__ = ["CONFIGS", "Case", "error", "noise"]


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from a million objects of imported libraries, and collects seldom.

    With them one collection takes half a second; without, at Python's thresholds, all of them a tenth of the CPU time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


@dataclass(frozen=True)
class Case:
    """Inputs of a network, batch 2 with nothing in common, and outputs of the reference (`tests.support.golden`)."""

    inputs: tuple
    expected: np.ndarray
    taps: tuple = ()


@pytest.fixture(scope="session")
def reference():
    """The module `tests.support.reference`; tests that use it are skipped without torch."""
    pytest.importorskip("torch")
    from tests.support import reference

    return reference


@pytest.fixture(scope="session")
def pipe(reference):
    """A StableVideoDiffusionPipeline of random networks of the tiny configs, fp32. Not to be changed."""
    return reference.pipeline(CONFIGS["unet"], CONFIGS["vae"], CONFIGS["image_encoder"])


@pytest.fixture(scope="session")
def pipeline_folder(request, tmp_path_factory):
    """`pipe` as its users find it on disk: written by diffusers, or by our exporter where there is no torch."""
    folder = tmp_path_factory.mktemp("diffusers") / "svd-tiny"
    if find_spec("torch"):
        return request.getfixturevalue("reference").save(request.getfixturevalue("pipe"), folder)
    return exported(folder, CONFIGS)


@pytest.fixture(scope="session")
def smallest_pipeline_folder(request, tmp_path_factory):
    """A folder like `pipeline_folder`, of networks that commands compile in half the time."""
    folder = tmp_path_factory.mktemp("diffusers") / "svd-smallest"
    if find_spec("torch"):
        reference = request.getfixturevalue("reference")
        return reference.save(reference.pipeline(*golden.SMALLEST.values()), folder)
    return exported(folder, golden.SMALLEST)


def exported(folder: Path, configs: dict) -> Path:
    """Returns `folder`, into which our exporter writes networks of `configs` with random weights."""
    from sfv_jax.weights.pipeline import SIGMAS, save_pipeline

    save_pipeline(folder, lambda name: golden.component_params(name, configs[name]), configs, SIGMAS)
    return folder


@pytest.fixture(scope="session")
def model_folder(pipeline_folder, tmp_path_factory):
    """`pipe`, converted to our model folder."""
    from sfv_jax.checkpoints.importer import import_model

    folder = tmp_path_factory.mktemp("models") / "svd-tiny"
    import_model(pipeline_folder, folder)
    return folder


@pytest.fixture(scope="session")
def smallest_model_folder(smallest_pipeline_folder, tmp_path_factory):
    """`smallest_pipeline_folder`, converted to our model folder."""
    from sfv_jax.checkpoints.importer import import_model

    folder = tmp_path_factory.mktemp("models") / "svd-smallest"
    import_model(smallest_pipeline_folder, folder)
    return folder


@pytest.fixture(scope="session")
def params(pipeline_folder):
    """`{component: parameters}` of `pipe` in our layout."""
    from sfv_jax.weights.diffusers import load_component

    return {name: jax.tree.map(jax.numpy.asarray, load_component(pipeline_folder / name, name)[0]) for name in CONFIGS}


@pytest.fixture(scope="session")
def build(params):
    """`build(component, config=None, params=None)`: our network with the weights of `pipe`, ready to call."""
    from sfv_jax.weights.components import COMPONENTS

    def build(component, config=None, weights=None):
        graphdef, _ = tree.abstract(COMPONENTS[component].module, config or CONFIGS[component])
        return tree.build(graphdef, weights or params[component])

    return build


@pytest.fixture(scope="session")
def stored():
    """The golden outputs of the networks."""
    golden.check_weights()
    return golden.load("networks")


@pytest.fixture(scope="session")
def unet_case(stored) -> Case:
    return Case(golden.unet_inputs(), stored["unet"], (stored["unet_tap_0"], stored["unet_tap_1"]))


@pytest.fixture(scope="session")
def encoder_case(stored) -> Case:
    return Case(golden.encoder_inputs(), stored["encoder"])


@pytest.fixture(scope="session")
def decoder_case(stored) -> Case:
    return Case(golden.decoder_inputs(), stored["decoder"])


@pytest.fixture(scope="session")
def clip_case(stored) -> Case:
    return Case(golden.clip_inputs(), stored["clip"])


def value_and_gradients(function, *args) -> tuple:
    """`function(*args)` and the gradients of its sum of squares; jitted."""

    def loss(*args):
        y = function(*args)
        return jax.numpy.sum(y**2), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(args))), has_aux=True))(*args)
    return y, *gradients


def assert_equal(found: tuple, expected: tuple, tolerance: float) -> None:
    """Largest differences, relative to the largest number of each array."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.max(np.abs(np.asarray(a, np.float64) - b)) <= tolerance * np.max(np.abs(b))


# Config fields that the program of a train step does not depend on.
OF_THE_LOOP = ("init", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "sample_every")
OF_THE_LOOP += ("backbone_init", "sample_count", "data", "alarms", "wandb_project", "profile_start", "profile_steps")
STEPS: dict[tuple, Callable] = {}  # compiled train steps


def shared_step(method, networks, config, mesh, shardings) -> Callable:
    """Returns `jit_train_step` of the same arguments, one for all runs whose steps are the same program."""
    fields = {name: value for name, value in config.to_dict().items() if name not in OF_THE_LOOP}
    key = (method.__name__, networks, mesh, json.dumps(fields, sort_keys=True))
    if key not in STEPS:
        STEPS[key] = step.jit_train_step(method, networks, config, mesh, shardings)
    return STEPS[key]


@pytest.fixture(scope="module")
def runs_share_programs():
    """Train steps, and programs of the pictures made during training, are compiled once for all runs of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "jit_train_step", shared_step)
        patch.setattr(previews, "Generator", functools.cache(previews.Generator))
        yield
    STEPS.clear()


@pytest.fixture(scope="module")
def small_things_in_parts():
    """Arrays of 64 elements are sharded, else nothing in small networks is."""
    small, sharding.SMALL = sharding.SMALL, 64
    yield
    sharding.SMALL = small
