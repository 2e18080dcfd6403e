"""Use of a tiny decoder: in the codec, and from its training by way of its folder to frames that come one by one."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.checkpoints.decoders import import_decoder, read_tiny
from sfv_jax.config import ConfigError
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.codec import PatchCodec, SVDCodec
from sfv_jax.models.decoders import VAEConfig, decode_pixels
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.sampling import Sampler, files
from sfv_jax.training import loop
from sfv_jax.training.loop import train
from sfv_jax.weights.folders import WeightsError
from tests.conftest import noise
from tests.test_configs import get_config

pytestmark = pytest.mark.usefixtures("runs_share_programs")

TINY = TinyDecoderConfig(4, 3, (8, 6), (1, 1))


def codec(**kw) -> SVDCodec:
    params = tree.init(TinyTemporalDecoder, TINY, 2)
    params["conv_out"]["bias"] += 0.5
    return SVDCodec(VAEConfig.tiny(), CLIPConfig.tiny(), {"tiny_decoder": params}, tiny=TINY, **kw)


def test_frames_are_the_same_however_they_are_decoded():
    """All at once, in chunks or pieces of frames that carry the memory on, and one after another."""
    latents, one = noise(1, 2, 5, 2, 3, 4), codec()
    graph, _ = tree.abstract(TinyTemporalDecoder, TINY)
    unit = np.asarray(tree.build(graph, one.params["tiny_decoder"])(latents))
    expected = np.round(unit.clip(0, 1) * 255).astype(int)
    assert expected.std() > 10
    frames = [one.decode(latents), one.decode(latents, 2), codec(pixels=2 * 24).decode(latents)]
    frames += [jnp.stack([frame for frame, _ in one.stream(latents)], axis=1)]
    for found in frames:
        assert found.dtype == jnp.uint8 and np.abs(np.asarray(found, int) - expected).max() <= 1
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        one.decode(latents, 0)


def test_frames_at_a_time_follow_from_memory():
    asked = []

    def at_once(*chunk, **kw) -> int:
        one = codec(**kw)
        one.decoder._decode = lambda params, latents, frames: (asked.append(frames), None)
        one.decoder(one.params, np.zeros((2, 5, 2, 3, 4), np.float32), *chunk)
        return asked[-1]

    assert at_once() == 5 and at_once(2) == 2  # small frames
    assert (at_once(pixels=0), at_once(pixels=1), at_once(pixels=100)) == (5, 1, 2)  # two frames of 24 pixels twice
    svd = TinyDecoderConfig(), (1, 14, 72, 128, 4), jnp.bfloat16
    assert decode_pixels(*svd, None) == decode_pixels(*svd, 12 * 2**30) == 2**18
    assert decode_pixels(*svd, 40 * 2**30) == 0


def test_frames_that_are_not_finite_are_found():
    latents, one = noise(1, 2, 3, 2, 3, 4), codec()
    latents[1, 1] = np.nan
    assert one.decode_checked(latents)[1].tolist() == [True, False]
    assert [sound.tolist() for _, sound in one.stream(latents)] == [[True, True], [True, False], [True, False]]


def test_the_patch_codec_streams_too():
    patches, latents = PatchCodec(), noise(1, 1, 3, 2, 2, 48)
    streamed = np.stack([frame for frame, _ in patches.stream(latents)], axis=1)
    np.testing.assert_array_equal(streamed, patches.decode(latents))


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def trained(smallest_model_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A model folder of this module's own, and the run of a decoder for it on the procedural world."""
    folder = tmp_path_factory.mktemp("decoder")
    model = shutil.copytree(smallest_model_folder, folder / "model")
    return model, folder / "run"


def config(model: Path, **changes):
    made = get_config("decoder")("tiny")
    made.update(dict(init=str(model), steps=2, batch_size=2, log_every=1, checkpoint_every=1, sample_every=2))
    made.update(dict(sample_count=1, data=dict(world_size=8, world=dict(num_frames=2))))
    made.decoder.update(dict(block_out_channels=(8, 8, 4, 4), layers_per_block=(1, 1, 1, 1)) | changes)
    return made


@pytest.mark.slow
def test_from_training_to_frames(trained, one_device, runs_share_programs, tmp_path, monkeypatch):
    model, run = trained
    whole = jax.device_get(train(config(model), run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/l1" in line] == [1, 2] and "heldout/psnr" in lines[-1]
    assert {"loss/l1", "loss/features", "loss/flicker", "quality/psnr", "motion/ratio"} <= lines[0].keys()
    assert (run / "samples/0000002.png").is_file() and not (run / "network.json").exists()
    # An interrupted run continues exactly.
    short = config(model)
    short.steps = 1
    train(short, tmp_path / "again")
    again = jax.device_get(train(config(model), tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    # The average goes into the model folder, and from there into a sampler.
    with pytest.raises(WeightsError, match="has no tiny_decoder; train one"):
        Sampler.load(model, decoder="tiny")
    import_decoder(run, model / "tiny_decoder")
    stored = read_tiny(model / "tiny_decoder")
    expected = {k: v for k, v in whole["ema"].items() if k != "projectors"}
    jax.tree.map(np.testing.assert_array_equal, stored.params, expected)
    assert stored.origin["step"] == 2 and stored.space == read_tiny(run).space
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    sampler = Sampler.load(model, decoder="tiny")
    frames = sampler([image], num_frames=3)[0]
    streamed = np.stack(list(sampler.stream(image, num_frames=3)))
    assert frames.shape == streamed.shape == (3, 16, 16, 3)
    assert np.abs(frames.astype(int) - streamed).max() <= 1
    full = Sampler.load(model)
    changed = full.with_decoder("tiny")
    np.testing.assert_array_equal(np.stack(list(changed.stream(image, num_frames=3))), streamed)
    assert changed.decoder == sampler.decoder and changed.with_decoder("full").decoder == "full"
    np.testing.assert_array_equal(changed.with_decoder("full")([image], num_frames=3), full([image], num_frames=3))
    shared = Sampler.load(model, mesh=make_mesh(1, 2, 1, devices=jax.devices()[:2])).with_decoder("tiny")
    assert np.abs(shared([image], num_frames=3)[0].astype(int) - frames).max() <= 1
    direct = Sampler.load(model, decoder=run)
    np.testing.assert_array_equal(direct([image], num_frames=3)[0], frames)
    with pytest.raises(WeightsError, match="is a run that trains a tiny decoder: name a model here"):
        Sampler.load(run)
    # The command writes frames as they come; the record names the decoder.
    from PIL import Image

    Image.fromarray(image).save(tmp_path / "in.png")
    options = dict.fromkeys(files.OPTIONS) | dict(
        steps=1, sampler="euler", fit="crop", fps=7, motion_bucket_id=127, guidance=None
    )
    options |= dict(noise_aug_strength=0.02, num_frames=3)
    about = {"checkpoint": "model", "decoder": sampler.decoder}
    monkeypatch.setattr(type(sampler), "__call__", lambda *_, **__: pytest.fail("decoded whole"))
    files.run(
        sampler,
        files.jobs(tmp_path / "in.png", tmp_path / "out.mp4", "mp4"),
        files.Settings(options, 0, 1, False, about),
    )
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["decoder"]["sha256"] == stored.origin["sha256"] and record["decoder"]["step"] == 2
    assert record["num_frames"] == 3 and record["seconds"] > 0 and len(record["video_sha256"]) == 64


@pytest.mark.slow
def test_what_cannot_be_distilled(trained, one_device, tmp_path):
    model, _ = trained
    without = config(model)
    without.init = ""
    cached = config(model, real_weight=1.0)
    cached.data.source = "latents"
    for message, made in (
        ("config.init is empty: name a model folder or a run, whose VAE", without),
        ("real_weight needs real frames", cached),
        ("which takes 4 levels", config(model, block_out_channels=(8, 8), layers_per_block=(1, 1))),
    ):
        with pytest.raises(ConfigError, match=message):
            train(made, tmp_path / "run")
        assert not (tmp_path / "run").exists()
