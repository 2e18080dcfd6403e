"""Fixtures shared by all tests: small networks with random weights, as the torch reference, on disk, and as ours."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from flax import nnx

from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig

jax.config.update("jax_num_cpu_devices", 8)  # meshes of several devices on any machine
jax.config.update("jax_default_matmul_precision", "highest")

CONFIGS = {"unet": UNetConfig.tiny(), "vae": VAEConfig.tiny(), "image_encoder": CLIPConfig.tiny()}


@dataclass(frozen=True)
class Case:
    """Inputs of a network, batch 2 with nothing in common, and what the reference makes of them in float64."""

    inputs: tuple
    expected: np.ndarray
    taps: tuple = ()


@pytest.fixture(scope="session")
def reference():
    """The module `tests.reference`; tests that use it are skipped without torch."""
    pytest.importorskip("torch")
    from tests import reference

    return reference


@pytest.fixture(scope="session")
def pipe(reference):
    """A StableVideoDiffusionPipeline of random networks of the tiny configs, fp32. Not to be changed."""
    return reference.pipeline(CONFIGS["unet"], CONFIGS["vae"], CONFIGS["image_encoder"])


@pytest.fixture(scope="session")
def pipeline_folder(reference, pipe, tmp_path_factory):
    """`pipe` as its users find it on disk."""
    return reference.save(pipe, tmp_path_factory.mktemp("diffusers") / "svd-tiny")


@pytest.fixture(scope="session")
def model_folder(pipeline_folder, tmp_path_factory):
    """`pipe`, converted to our model folder."""
    from sfv_jax.convert import import_pipeline

    folder = tmp_path_factory.mktemp("models") / "svd-tiny"
    import_pipeline(pipeline_folder, folder)
    return folder


@pytest.fixture(scope="session")
def params(pipeline_folder):
    """`{component: parameters}` of `pipe` in our layout."""
    from sfv_jax.weights.diffusers import load_component

    return {name: jax.tree.map(jax.numpy.asarray, load_component(pipeline_folder / name, name)[0]) for name in CONFIGS}


@pytest.fixture(scope="session")
def build(params):
    """`build(component, config=None, params=None)`: our network with the weights of `pipe`, ready to call."""
    from sfv_jax.weights.configs import COMPONENTS

    def build(component, config=None, weights=None):
        graphdef, _ = tree.abstract(COMPONENTS[component].module, config or CONFIGS[component])
        return nnx.merge(graphdef, weights or params[component])

    return build


def noise(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="session")
def unet_case(reference, pipe) -> Case:
    """UNet inputs `(x, c_noise, context, ids)` with different contexts, noise levels and ids in the batch."""
    c_noise = np.array([1.2, -0.4], np.float32)
    ids = np.array([[6, 127, 0.02], [11, 40, 0.1]], np.float32)
    inputs = (noise(0, 2, 3, 8, 12, 8), c_noise, noise(1, 2, 32), ids)
    expected, taps = reference.run_unet(pipe.unet, *inputs)
    return Case(inputs, expected, tuple(taps))


@pytest.fixture(scope="session")
def encoder_case(reference, pipe) -> Case:
    frames = noise(2, 2, 3, 32, 48, 3)
    return Case((frames,), reference.run_vae_encoder(pipe.vae, frames))


@pytest.fixture(scope="session")
def decoder_case(reference, pipe) -> Case:
    latents = noise(3, 2, 3, 4, 6, 4)
    return Case((latents,), reference.run_vae_decoder(pipe.vae, latents))


def error(found, expected: np.ndarray) -> tuple[float, float]:
    """(max, rms) difference in units of the expected output's standard deviation."""
    difference = np.abs(np.asarray(found, np.float64) - expected) / expected.std()
    return float(difference.max()), float(np.sqrt(np.mean(difference**2)))
