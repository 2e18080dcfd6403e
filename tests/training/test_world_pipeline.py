"""From frames to videos with SVD's own classes: VAE, encoders, UNet and a packed model, on a world of 8x8 pixels."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.checkpoints import box
from sfv_jax.checkpoints.base import load_encoders, load_vae
from sfv_jax.checkpoints.decoders import find_decoder, latent_space, pack_decoder, read_tiny
from sfv_jax.checkpoints.exporter import export_model
from sfv_jax.checkpoints.model_folder import load_model, read_model
from sfv_jax.config import ConfigDict, ConfigError
from sfv_jax.data.worlds import World
from sfv_jax.models import tree
from sfv_jax.reproduction import strips
from sfv_jax.runtime import sharding
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.training import loop
from sfv_jax.training.encoders import export_encoders
from sfv_jax.weights.folders import WeightsError
from tests.test_configs import get_config

RULES = dict(size=8, num_frames=3, radii=(1.5, 2.0), bodies=2, texture=8.0)
SIZES = dict(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, temporal_conv="matmul")


def vae_config(**changes) -> ConfigDict:
    config = configs.vae()
    config.update(dict(dtype="float32", steps=2, batch_size=2, log_every=1, checkpoint_every=2, sample_every=2))
    config.update(dict(autoencoder=SIZES, sample_count=2))
    config.data.update(source="world", world=ConfigDict(RULES), world_size=16)
    config.update(changes)
    return config.lock()


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight devices are of no use to batches of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folders of a VAE's run, of its decoder's second stage, of the encoders and of a packed model."""
    place = tmp_path_factory.mktemp("world")
    loop.train(vae_config(trainable=r"conv_out\."), place / "vae")  # which compiles sooner
    second = vae_config(init=str(place / "vae"), trainable="^decoder", sample_every=0)
    with second.unlocked():
        second.vae.num_frames = 3
    loop.train(second, place / "decoder")
    export_encoders(place / "decoder", place / "encoders")
    teacher = configs.teacher()
    teacher.update(dict(encoders=str(place / "encoders"), dtype="float32", steps=1, batch_size=2, sample_every=0))
    teacher.trainable = "conv_out"
    teacher.data.update(source="world", world=ConfigDict(RULES), world_size=16)
    unet = dict(in_channels=8, out_channels=4, block_out_channels=(32,), num_attention_heads=(1,))
    more = dict(layers_per_block=1, cross_attention_dim=64, addition_time_embed_dim=8, num_frames=3)
    teacher.unet = ConfigDict(unet | more | dict(temporal_conv="matmul"))
    loop.train(teacher.lock(), place / "teacher")
    export_model(place / "teacher", place / "packed", what="model", variant="fp16")
    return place


@pytest.mark.slow
def test_the_second_stage_starts_from_the_first_and_keeps_its_encoder(folders):
    first, second = (load_vae(folders / name)[1] for name in ("vae", "decoder"))
    for part in ("encoder", "quant_conv"):
        jax.tree.map(np.testing.assert_array_equal, first[part], second[part])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first["decoder"], second["decoder"])
    assert any(jax.tree.leaves(moved))
    lines = [json.loads(line) for line in (folders / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert any("heldout/psnr" in line for line in lines) and (folders / "vae" / "samples" / "0000002.png").is_file()


@pytest.mark.slow
def test_latents_have_unit_scale(folders):
    codec = Sampler.load(folders / "packed").codec
    world = World(**RULES)
    latents = codec.encode(world.batch(range(256))[0]) * codec.scaling_factor
    assert float(np.sqrt(np.mean(np.square(latents)))) == pytest.approx(1, abs=1e-2)
    assert read_model(folders / "encoders").meta["source"]["world"]["size"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "kept"), [(1.004, True), (1.5, False)])
def test_a_scaling_factor_that_fits_stays(folders, tmp_path, ratio, kept):
    """A decoder that was tuned on the encoder of a model must not change the scale of the model's latents."""
    factor = load_vae(folders / "encoders")[0].scaling_factor
    run = shutil.copytree(folders / "decoder", tmp_path / "run")
    network = json.loads((run / "network.json").read_text())
    network["vae"]["scaling_factor"] = factor * ratio
    (run / "network.json").write_text(json.dumps(network))
    export_encoders(run, tmp_path / "again", base=folders / "encoders")
    assert load_vae(tmp_path / "again")[0].scaling_factor == (factor * ratio if kept else factor)


@pytest.mark.slow
def test_a_packed_model_is_the_run_in_half_precision(folders):
    run, packed = Sampler.load(folders / "teacher"), Sampler.load(folders / "packed")
    for found, kept in zip(jax.tree.leaves(packed.params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_array_equal(found, np.asarray(kept).astype(np.float16).astype(np.float32))
    image = World(**RULES).clip(0)[0][0]
    videos = [sampler([image]) for sampler in (run, packed)]
    assert videos[0].shape == (1, 3, 8, 8, 3)
    assert np.abs(videos[0].astype(int) - videos[1]).max() <= 2
    picture = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)  # videos have the world's size
    shapes = {sampler([picture]).shape for sampler in (run, packed)}
    assert shapes == {videos[0].shape} and packed.size(picture, None, 16) == (8, 16)
    sizes = {file.name for file in (folders / "packed").iterdir()}
    assert sizes == {"model.json", "fingerprints.json", *(f"{x}.safetensors" for x in ("unet", "vae", "image_encoder"))}


@pytest.mark.slow
def test_diffusers_decodes_the_same(folders, tmp_path):
    """Although its norms have 32 groups and those of the VAE have 4."""
    pytest.importorskip("torch")
    import torch
    from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline

    export_model(folders / "teacher", tmp_path / "out")
    theirs = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert isinstance(theirs.vae, AutoencoderKLTemporalDecoder)
    codec = Sampler.load(folders / "teacher").codec
    latents = np.asarray(codec.encode(World(**RULES).clip(1)[0][None])) * codec.scaling_factor
    with torch.no_grad():
        scaled = torch.tensor(latents[0]).permute(0, 3, 1, 2) / theirs.vae.config.scaling_factor
        frames = theirs.vae.decode(scaled, num_frames=3).sample.permute(0, 2, 3, 1).numpy()
    found = np.asarray(codec.decode(latents))[0].astype(int)
    assert np.abs(np.clip(np.round(127.5 * (frames + 1)), 0, 255) - found).max() <= 1


@pytest.mark.slow
def test_a_flipped_bit_in_a_packed_model_is_noticed(folders, tmp_path):
    for file in (folders / "packed").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "vae.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="vae is damaged: 1 of"):
        load_model(tmp_path, ("vae",))


@pytest.fixture
def boxed(tmp_path, monkeypatch):
    """Returns a function that puts a packed model folder into an otherwise empty package, and returns its place."""
    monkeypatch.setattr(box, "ROOT", tmp_path / "box")
    monkeypatch.setattr(box, "NAMES", {})

    def put(folder, name: str):
        place = shutil.copytree(folder, box.ROOT / name)
        box.NAMES[name] = {file.name: box.sha256(file) for file in place.iterdir()}
        box.folder.cache_clear()
        return place

    yield put
    box.folder.cache_clear()


@pytest.mark.slow
def test_models_in_the_package_have_names_and_known_files(folders, boxed):
    place = boxed(folders / "packed", "tiny")
    assert read_model("tiny").path == place and box.name_of(place) == "tiny"
    assert tree.count(Sampler.load("tiny").params) == tree.count(Sampler.load(folders / "packed").params)
    (place / "model.json").write_text((place / "model.json").read_text() + " ")
    box.folder.cache_clear()
    with pytest.raises(WeightsError, match="model.json is not the published file"):
        read_model("tiny")
    (place / "model.json").unlink()
    box.folder.cache_clear()
    with pytest.raises(WeightsError, match="came without the model 'tiny'"):
        read_model("tiny")
    box.folder.cache_clear()
    with pytest.raises(WeightsError, match="other does not exist; the models in the package are tiny"):
        read_model("other")


@pytest.mark.slow
def test_unets_in_the_package_share_their_encoders(folders, boxed, tmp_path):
    """The export of a run on packaged encoders holds its UNet alone; trained on, it is still a model of theirs."""
    export_encoders(folders / "decoder", tmp_path / "packed", fp16=True)
    boxed(tmp_path / "packed", "enc")
    run = shutil.copytree(folders / "teacher", tmp_path / "run")
    network = json.loads((run / "network.json").read_text()) | {"model": "enc"}
    (run / "network.json").write_text(json.dumps(network))
    export_model(run, tmp_path / "unet", what="model")
    assert {x.name for x in (tmp_path / "unet").iterdir()} == {"model.json", "fingerprints.json", "unet.safetensors"}
    boxed(tmp_path / "unet", "whole")

    image = World(**RULES).clip(0)[0][0]
    samplers = [Sampler.load(path) for path in (run, "whole")]
    np.testing.assert_array_equal(*(sampler([image]) for sampler in samplers))
    model = read_model("whole")
    assert model.meta["run"]["step"] == 1 and model.meta["run"]["config"]["method"] == "teacher"
    assert latent_space(model) == latent_space(read_model("enc"))
    assert load_encoders("whole")[1] == load_encoders("enc")[1]
    config = configs.teacher()
    config.update(dict(init="whole", dtype="float32", steps=1, batch_size=2, sample_every=0, trainable="conv_out"))
    config.data.update(source="world", world=ConfigDict(RULES), world_size=16)
    loop.train(config.lock(), tmp_path / "again")
    assert json.loads((tmp_path / "again/network.json").read_text())["model"] == "whole"
    export_model(tmp_path / "again", tmp_path / "third", what="model")
    assert read_model(tmp_path / "third").meta["encoders"] == "enc"

    about = json.loads((tmp_path / "unet/model.json").read_text())
    (tmp_path / "unet/model.json").write_text(json.dumps(about | {"encoders": "gone"}))
    with pytest.raises(WeightsError, match="uses the encoders gone of another version of this package; it has enc,"):
        read_model(tmp_path / "unet")
    about["source"]["sha256"]["vae/parameters"] = 64 * "0"
    (tmp_path / "unet/model.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match="was trained on another version of enc"):
        read_model(tmp_path / "unet")


@pytest.mark.slow
def test_a_tiny_decoder_in_the_package_belongs_to_its_encoders(folders, boxed, tmp_path, monkeypatch):
    """It is found by its name and as that of every model of these encoders, and refused by others."""
    monkeypatch.setattr(box, "DECODERS", {"enc": "dec"})
    export_encoders(folders / "decoder", tmp_path / "packed", fp16=True)
    boxed(tmp_path / "packed", "enc")
    config = get_config("decoder")("tiny")
    config.update(dict(init="enc", steps=1, batch_size=2, log_every=1, sample_every=0))
    with config.unlocked():
        config.data.update(world=ConfigDict(RULES), world_size=8)
    config.decoder.update(block_out_channels=(6, 4), layers_per_block=(1, 1), crop=0)
    loop.train(config, tmp_path / "run")
    pack_decoder(tmp_path / "run", tmp_path / "fp16", fp16=True)
    with pytest.raises(WeightsError, match="exists already"):
        pack_decoder(tmp_path / "run", tmp_path / "fp16")
    place = boxed(tmp_path / "fp16", "dec")
    assert {x.name for x in place.iterdir()} == {"model.json", "fingerprints.json", "tiny_decoder.safetensors"}
    found, trained = read_tiny(Path("dec")), read_tiny(tmp_path / "run")
    halved = jax.tree.map(lambda x: np.float32(np.float16(x)), trained.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, halved)
    assert found.config == trained.config and found.space == trained.space == latent_space(read_model("enc"))
    assert found.record()["path"] == "dec" and found.record()["step"] == 1 and len(found.record()["sha256"]) == 64

    run = shutil.copytree(folders / "teacher", tmp_path / "unet")
    network = json.loads((run / "network.json").read_text()) | {"model": "enc"}
    (run / "network.json").write_text(json.dumps(network))
    image = World(**RULES).clip(0)[0][0]
    full, named, own = (Sampler.load(run, decoder=name) for name in ("full", "dec", "tiny"))
    assert full.decoder == "full" and named.decoder == own.decoder == found.record()
    np.testing.assert_array_equal(named([image]), own([image]))
    assert np.abs(named([image]).astype(int) - full([image])).max() > 9
    assert strips.by_tiny_decoder(full) is not None
    # A model with encoders of its own has none, and this is not one of theirs.
    with pytest.raises(WeightsError, match="packed has no tiny_decoder; train one"):
        find_decoder("tiny", read_model(folders / "packed"))
    with pytest.raises(WeightsError, match="dec has no unet, only"):
        Sampler.load("dec")
    assert find_decoder("dec", read_model(folders / "packed")).space == found.space  # the same VAE, elsewhere
    export_encoders(folders / "vae", tmp_path / "first")
    with pytest.raises(WeightsError, match="was distilled from another VAE than that of") as caught:
        find_decoder("dec", read_model(tmp_path / "first"))
    assert "\n" not in str(caught.value)
    # Encoders that were trained again take no decoder of before.
    about = json.loads((place / "model.json").read_text())
    about["source"]["sha256"]["vae/parameters"] = 64 * "0"
    (tmp_path / "fp16/model.json").write_text(json.dumps(about))
    shutil.rmtree(place)
    boxed(tmp_path / "fp16", "dec")
    for use in (lambda: read_tiny(Path("dec")), lambda: Sampler.load(run, decoder="tiny")):
        with pytest.raises(
            WeightsError, match="dec was trained on another version of enc than the one in this package"
        ):
            use()
    # A decoder of a VAE that is not in the package is not packed.
    monkeypatch.setattr(box, "DECODERS", {})
    with pytest.raises(WeightsError, match=r"is not in the package \(\): write it to MODEL/tiny_decoder instead"):
        pack_decoder(tmp_path / "run", tmp_path / "other")


def test_what_a_vae_cannot_be_trained_on_is_refused(tmp_path):
    wrong = vae_config()
    with wrong.unlocked():
        wrong.vae.num_frames = 4
    with pytest.raises(ConfigError, match=r"config.vae.num_frames=4: clips have 3 frames"):
        loop.train(wrong, tmp_path / "frames")
    world = ConfigDict(RULES | dict(size=9))
    with pytest.raises(ConfigError, match=r"config.data.world.size=9: give a multiple of the VAE's 2"):
        loop.train(vae_config(data=dict(world=world)), tmp_path / "size")
    with pytest.raises(ConfigError, match=r"config.data.source=latents: a VAE is trained on frames"):
        loop.train(vae_config(data=dict(source="latents")), tmp_path / "source")
    assert dataclasses.asdict(World(**RULES))["bodies"] == 2 and not any(tmp_path.iterdir())
