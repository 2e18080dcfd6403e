"""Golden files: outputs of the torch reference, with which the parity tests run without torch.

    python -m tests.support.golden

writes `tests/golden/*.npz` anew (which needs torch) and prints the distances of the new arrays from the stored ones.
numpy draws weights and inputs from seeds, so only expected outputs are stored: the results of diffusers and
transformers in float64 on those weights, rounded to float32 (the pipeline's scheduler rounds its latents to float32 at
every step; the rest of the step is float64). Each file contains the versions that wrote it.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np

from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.weights.components import COMPONENTS
from sfv_jax.weights.diffusers import manifest, their_name, to_ours

FOLDER = Path(__file__).parents[1] / "golden"
CONFIGS = {"unet": UNetConfig.tiny(), "vae": VAEConfig.tiny(), "image_encoder": CLIPConfig.tiny()}
SMALLEST = {  # not of the golden files: the same classes with fewer layers
    "unet": UNetConfig.tiny(block_out_channels=(32,), num_attention_heads=(2,)),
    "vae": VAEConfig.tiny(layers_per_block=1),
    "image_encoder": CLIPConfig.tiny(num_hidden_layers=1),
}

STEPS = (1, 4, 8, 16, 25)  # of the noise schedules
SIDES = (100, 224, 448, 576, 768, 1024, 1080, 1920)  # resized to 224 for CLIP
IMAGE_SIZES = ((576, 1024), (448, 768), (1080, 1920), (224, 100))  # preprocessed for CLIP
COLUMNS, GRID = slice(5, None, 16), slice(3, None, 8)  # stored parts of resized and of preprocessed images

SIZE, FRAMES = (32, 48), 4  # of the pipeline's videos
IDS = (6.0, 90.0, 0.05)  # fps - 1, motion bucket, strength of the pixel noise
RUNS = {"one_step": (1, None), "guided_steps": (3, (1.0, 3.0))}  # steps, first and last guidance


def noise(seed: int, *shape: int) -> np.ndarray:
    """Returns standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Draws float32 weights of a network by diffusers' names; a tensor depends on its name, its shape and the seed.

    Default initialization contains zeros, ones and equal mixing factors, which mask errors. Here norm scales are
    1 + 0.2 N, biases 0.1 N, mixing factors N, kernels about N / sqrt(fan in), all others 0.2 N.
    """
    return {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draws one tensor of `random_weights`."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    values = noise(int.from_bytes(digest[:8]), *shape)
    if name.endswith("mix_factor"):
        return values
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if "norm" in name or "layrnorm" in name:
        return 1 + np.float32(0.2) * values
    if len(shape) > 1 and "embedding.weight" not in name:
        gain = 0.5 if len(shape) > 2 else 1.0  # small features reveal the epsilons of the norms
        return np.float32(gain / np.prod(shape[1:]) ** 0.5) * values
    return np.float32(0.2) * values


def component_weights(component: str, config=None) -> dict[str, np.ndarray]:
    """Returns `random_weights` of a network, by default of the tiny one of the golden files."""
    return random_weights(manifest(component, config or CONFIGS[component]), seed=list(CONFIGS).index(component) + 1)


def component_params(component: str, config=None) -> tree.Params:
    """Returns `component_weights` of a network, by default of the tiny one, in our layout."""
    weights = component_weights(component, config)
    _, shapes = tree.abstract(COMPONENTS[component].module, config or CONFIGS[component])
    return tree.unflatten({path: to_ours(path, weights[their_name(path)]) for path in tree.flatten(shapes)})


def unet_inputs() -> tuple[np.ndarray, ...]:
    """Returns `(x, c_noise, context, ids)`, batch 2 with different contexts, noise levels and ids."""
    c_noise = np.array([1.2, -0.4], np.float32)
    ids = np.array([[6, 127, 0.02], [11, 40, 0.1]], np.float32)
    return noise(0, 2, 3, 8, 12, 8), c_noise, noise(1, 2, 32), ids


def encoder_inputs() -> tuple[np.ndarray]:
    return (noise(2, 2, 3, 32, 48, 3),)


def decoder_inputs() -> tuple[np.ndarray]:
    return (noise(3, 2, 3, 4, 6, 4),)


def clip_inputs() -> tuple[np.ndarray]:
    """Returns preprocessed images."""
    return (noise(4, 2, 224, 224, 3),)


def resize_input(side: int) -> np.ndarray:
    """Returns `[side, 224]` in [-1, 1]."""
    return np.random.default_rng(side).uniform(-1, 1, (side, 224)).astype(np.float32)


def preprocess_input(height: int, width: int) -> np.ndarray:
    """Returns `[1, height, width, 3]` in [0, 1]."""
    return np.random.default_rng(5).random((1, height, width, 3), np.float32)


def pipeline_images() -> list[np.ndarray]:
    """Returns two different images whose size fits neither the video nor CLIP's patches."""
    return list(np.random.default_rng(0).integers(0, 256, (2, 70, 90, 3), dtype=np.uint8))


def pipeline_noise() -> tuple[np.ndarray, np.ndarray]:
    """Returns the initial latents and the noise added to the pixels of the condition."""
    return noise(1, 2, FRAMES, SIZE[0] // 8, SIZE[1] // 8, 4), noise(6, 2, *SIZE, 3)


def check_weights() -> None:
    """Raises RuntimeError if this numpy draws other random weights than those of the golden files."""
    for component, sums in weight_sums().items():
        if not np.allclose(sums, load("weights")[component], rtol=1e-5, atol=1e-2):
            raise RuntimeError(f"numpy {np.__version__} draws other random numbers: make tests/golden anew")


def weight_sums() -> dict[str, np.ndarray]:
    """Returns sum and sum of squares of each network's random weights, which reveal another random generator."""
    sums = {}
    for component in CONFIGS:
        values = [x.astype(np.float64) for x in component_weights(component).values()]
        sums[component] = np.array([sum(x.sum() for x in values), sum(np.square(x).sum() for x in values)])
    return sums


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of `tests/golden/NAME.npz` without the versions."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {k: file[k] for k in file.files if k != "versions"}


def fresh() -> dict[str, dict[str, np.ndarray]]:
    """Computes `{file: {name: array}}`, float64, with the installed torch reference."""
    from tests.support import reference

    pipe = reference.pipeline(*CONFIGS.values())
    unet, taps = reference.run_unet(pipe.unet, *unet_inputs())
    return {
        "networks": {
            "unet": unet,
            **{f"unet_tap_{n}": tap for n, tap in enumerate(taps)},
            "encoder": reference.run(reference.encoder_output, pipe.vae, *encoder_inputs()),
            "decoder": reference.run(reference.decoder_output, pipe.vae, *decoder_inputs()),
            "clip": reference.run(reference.clip_output, pipe.image_encoder, *clip_inputs()),
        },
        "schedules": {
            f"{kind}_{steps}": values
            for steps in STEPS
            for kind, values in zip(("sigmas", "c_noise"), reference.run_scheduler(pipe, steps), strict=True)
        },
        "preprocessing": {f"resize_{n}": reference.run_resize(resize_input(n))[:, COLUMNS] for n in SIDES}
        | {
            f"preprocess_{h}x{w}": reference.run_preprocess(pipe, preprocess_input(h, w))[:, GRID, GRID]
            for h, w in IMAGE_SIZES
        },
        "pipeline": {
            name: reference.run_pipeline(pipe, pipeline_images(), *pipeline_noise(), IDS, *run)
            for name, run in RUNS.items()
        },
        "weights": weight_sums(),
    }


def error(found, expected: np.ndarray) -> tuple[float, float]:
    """Returns (maximum, rms) of the difference in units of the standard deviation of `expected`."""
    difference = np.abs(np.asarray(found, np.float64) - expected) / expected.std()
    return float(difference.max()), float(np.sqrt(np.mean(difference**2)))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference over the expected array's standard deviation, or over its size if constant."""
    return float(np.abs(found - expected).max() / (expected.std() or np.abs(expected).max()))


def main() -> None:
    from tests.support import reference

    versions = json.dumps(reference.versions())
    FOLDER.mkdir(exist_ok=True)
    for name, arrays in fresh().items():
        path = FOLDER / f"{name}.npz"
        stored = load(name) if path.exists() else {}
        for key, values in arrays.items():
            known = key in stored and stored[key].shape == values.shape
            print(f"{name:14} {key:22} {f'{distance(stored[key], values):.1e}' if known else 'new'}")
        dtype = np.float64 if name == "weights" else np.float32
        np.savez_compressed(path, versions=versions, **{k: v.astype(dtype) for k, v in arrays.items()})
    print(f"{sum(p.stat().st_size for p in FOLDER.iterdir()):,} bytes, written by {versions}")


if __name__ == "__main__":
    main()
