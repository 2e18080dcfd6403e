"""The sampler's promises: seeds, compilation, and errors a person can act on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.unet import UNetConfig
from sfv_jax.sampler import Sampler
from sfv_jax.state import Networks
from tests.conftest import noise

UNET = UNetConfig(
    in_channels=24,
    out_channels=12,
    block_out_channels=(16,),
    num_attention_heads=(2,),
    layers_per_block=1,
    cross_attention_dim=12,
    addition_time_embed_dim=8,
    num_frames=3,
    norm_groups=4,
    temporal_conv="matmul",
)
CODEC = PatchCodec(patch=2, embed_cell=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """Programs that compile soon and run slowly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    rng = np.random.default_rng(1)
    shapes = Networks(UNET).abstract["generator"]
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)
    return Sampler(UNET, params, CODEC)


@pytest.fixture(scope="module")
def pair(sampler) -> np.ndarray:
    return sampler(IMAGES, seed=[7, 40])


def assert_same_frames(found, expected):
    """At most one grey level apart: programs for other batch sizes round differently."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_a_video_depends_on_its_own_seed_only(sampler, pair):
    assert pair.shape == (2, 3, 8, 8, 3)
    for n, seed in enumerate([7, 40]):
        assert_same_frames(sampler(IMAGES[n : n + 1], seed=seed), pair[n : n + 1])
    other = sampler(IMAGES, seed=[7, 41])
    assert_same_frames(other[:1], pair[:1])
    assert np.abs(other[1].astype(int) - pair[1]).max() > 10


def test_seeds_count_up(sampler):
    np.testing.assert_array_equal(sampler(IMAGES, seed=7), sampler(IMAGES, seed=[7, 8]))


def test_micro_conditions_matter(sampler, pair):
    for change in (dict(fps=20), dict(motion_bucket_id=5), dict(noise_aug_strength=0.5)):
        assert np.abs(sampler(IMAGES, seed=[7, 40], **change).astype(int) - pair).max() > 1, change


def test_known_shapes_are_not_compiled_again(sampler, pair):
    known = sampler._generate._cache_size()
    sampler(IMAGES[::-1], seed=[1, 2], fps=12, noise_aug_strength=0.1)
    assert sampler._generate._cache_size() == known
    sampler(IMAGES, num_frames=2)
    assert sampler._generate._cache_size() == known + 1


def test_images_are_stretched_to_the_size_asked_for(sampler):
    large = [np.repeat(np.repeat(image, 3, axis=0), 2, axis=1) for image in IMAGES]
    assert sampler(large, height=8, width=8, seed=[7, 40]).shape == (2, 3, 8, 8, 3)
    assert sampler.size(np.zeros((9, 13, 3)), None, None) == (8, 12)


def test_given_noise_replaces_the_seed(sampler):
    start = noise(3, 2, 3, 4, 4, 12)
    call = dict(noise=start, noise_aug_strength=0.0)
    np.testing.assert_array_equal(sampler(IMAGES, seed=0, **call), sampler(IMAGES, seed=5, **call))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(height=9), "height 9 is not a multiple of 2; nearest: 8 and 10"),
        (dict(seed=[1, 2, 3]), "2 images need as many seeds, got 3"),
        (dict(width=12), "images of 8x12 are embedded in 18 numbers, the UNet takes 12"),
        (dict(noise=np.zeros((2, 3, 4, 5, 12))), r"has shape \(2, 3, 4, 5, 12\), these images need \(2, 3, 4, 4, 12\)"),
    ],
)
def test_errors(sampler, changes, message):
    with pytest.raises(ValueError, match=message):
        sampler(IMAGES, **changes)


def test_images_must_be_pixels(sampler):
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\], got float64"):
        sampler([np.zeros((8, 8, 3))])


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        Sampler.load(tmp_path, dtype="int8")
