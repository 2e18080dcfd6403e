"""The discriminator's heads: the inputs on which each logit depends."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.models import layers, tree
from sfv_jax.models.discriminator import DiscriminatorConfig, DiscriminatorHeads, head_names, per_head
from tests.conftest import noise

CONFIG = DiscriminatorConfig(
    feature_channels=(8, 16), embed_dim=6, temporal_kernel=3, projection_dim=4, sinusoid_dim=8, norm_groups=4
)
B, T = 2, 5
FEATURES = [noise(0, B, T, 4, 6, 8), noise(1, B, T, 2, 3, 16)]
EMBED, C_NOISE = noise(2, B, 6), np.array([-0.5, 0.3], np.float32)


def build(config: DiscriminatorConfig) -> DiscriminatorHeads:
    """Heads with every parameter random: the default initialisation has zero biases and unit scales."""
    graphdef, shapes = tree.abstract(DiscriminatorHeads, config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)
    return tree.build(graphdef, params)


@pytest.fixture(scope="module")
def heads():
    return build(CONFIG)


@pytest.fixture(scope="module")
def logits(heads):
    return score(heads, FEATURES)


def score(heads, features, embed=EMBED, c_noise=C_NOISE) -> dict[str, np.ndarray]:
    """Returns the logit map of each head, by its name, from features per level."""
    maps = heads(per_head(CONFIG, features), embed, c_noise)
    return dict(zip(head_names(CONFIG), map(np.asarray, maps), strict=True))


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns where two logit maps differ by more than rounding."""
    return np.abs(a - b) > 1e-5


def test_size_at_full_width():
    _, shapes = tree.abstract(DiscriminatorHeads, DiscriminatorConfig.svd())
    assert tree.count(shapes) == 77_056_256


def test_one_map_per_head(logits):
    assert list(logits) == ["spatial_0", "spatial_1", "temporal_0", "temporal_1"]
    assert [x.shape for x in logits.values()] == 2 * [(B, T, 4, 6), (B, T, 2, 3)]


def test_samples_do_not_mix(heads, logits):
    swapped = score(heads, [f[::-1] for f in FEATURES], EMBED[::-1], C_NOISE[::-1])
    for name, x in swapped.items():
        np.testing.assert_allclose(x[::-1], logits[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("condition", ["image", "noise"])
def test_logits_depend_on_the_sample_s_own_condition(heads, logits, condition):
    embed = EMBED + np.array([[1], [0]], np.float32) if condition == "image" else EMBED
    c_noise = C_NOISE + np.array([0.7, 0], np.float32) if condition == "noise" else C_NOISE
    for name, x in score(heads, FEATURES, embed, c_noise).items():
        assert changed(x[0], logits[name][0]).mean() > 0.9, name
        assert not changed(x[1], logits[name][1]).any(), name


def test_spatial_logits_depend_on_the_frame_index(heads):
    """Scores of the same image in all frames differ from frame to frame."""
    still = [np.repeat(f[:, :1], T, axis=1) for f in FEATURES]
    for name, x in score(heads, still).items():
        if name.startswith("spatial"):
            assert changed(x[:, 1:], x[:, :-1]).mean() > 0.9, name


def test_spatial_heads_see_one_frame(heads, logits):
    moved = [f.copy() for f in FEATURES]
    for f in moved:
        f[:, 2] += noise(3, *f[:, 2].shape)
    for name, x in score(heads, moved).items():
        frames = changed(x, logits[name]).any(axis=(0, 2, 3))
        assert list(frames) == ([n == 2 for n in range(T)] if name.startswith("spatial") else [True] * T), name


def test_temporal_heads_see_one_position_and_do_not_wrap_around(heads, monkeypatch):
    """Without the norms, which share statistics, a change of the first frame reaches half a kernel at one position."""
    monkeypatch.setattr(layers.GroupNorm, "__call__", lambda self, x: x)
    moved = [f.copy() for f in FEATURES]
    for f in moved:
        f[:, 0, 1, 2] += 1
    before, after = (score(heads, f) for f in (FEATURES, moved))
    for name in ("temporal_0", "temporal_1"):
        expected = np.zeros(before[name].shape, bool)
        expected[:, :2, 1, 2] = True  # kernel 3: the frame itself and the next, not the last
        np.testing.assert_array_equal(changed(before[name], after[name]), expected)


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_each_kind_alone(logits, kind):
    config = replace(CONFIG, spatial=kind == "spatial", temporal=kind == "temporal")
    assert head_names(config) == [f"{kind}_0", f"{kind}_1"]
    found = build(config)(FEATURES, EMBED, C_NOISE)
    assert [x.shape for x in found] == [logits[name].shape for name in head_names(config)]


def test_refused_configs():
    with pytest.raises(ValueError, match="spatial heads, temporal heads, or both"):
        DiscriminatorConfig(spatial=False, temporal=False)
    with pytest.raises(ValueError, match="temporal_kernel must be odd"):
        DiscriminatorConfig(temporal_kernel=4)


@pytest.mark.slow
def test_logits_are_fp32_whatever_the_compute_dtype():
    graphdef, shapes = tree.abstract(DiscriminatorHeads, CONFIG, dtype=jnp.bfloat16)
    heads = tree.build(graphdef, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes))
    assert {x.dtype for x in heads(per_head(CONFIG, FEATURES), EMBED, C_NOISE)} == {jnp.dtype("float32")}
