"""Tiny decoders on disk: round trips under both kinds of names, and what does not belong to a model."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from sfv_jax.checkpoints import decoders
from sfv_jax.checkpoints.base import Base
from sfv_jax.checkpoints.decoders import (
    LatentSpace,
    check_space,
    choose_decoder,
    export_decoder,
    import_decoder,
    latent_space,
    read_tiny,
    save_tiny,
)
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.taesdv import taesdv_names
from sfv_jax.weights.writer import write_safetensors
from tests.support.taesdv import decoder_shapes, random_decoder

CONFIG = TinyDecoderConfig(block_out_channels=(8, 8, 6, 4), layers_per_block=(1, 2, 1, 1), mid_layers=1)


def write(path: Path, weights: dict[str, np.ndarray], metadata=None) -> Path:
    shapes = {name: value.shape for name, value in weights.items()}
    write_safetensors(path, shapes, weights.items(), np.dtype(np.float32), metadata)
    return path


@pytest.fixture
def released(tmp_path) -> Path:
    """A file under TAESDV's names, with an encoder that is not needed."""
    encoder = {"encoder.0.weight": np.zeros((8, 3, 3, 3), np.float32), "encoder.2.conv.0.bias": np.ones(8, np.float32)}
    return write(tmp_path / "taesdv.safetensors", random_decoder(CONFIG) | encoder)


@pytest.fixture
def model(model_folder, tmp_path) -> Path:
    """A model folder of the test's own; only what identifies it is copied."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.json", "fingerprints.json"):
        shutil.copy(model_folder / name, folder / name)
    return folder


def params() -> dict:
    return tree.init(TinyTemporalDecoder, CONFIG, 1)


def assert_same(found: dict, expected: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_both_kinds_of_names_round_trip(released, model, tmp_path):
    first = read_tiny(released)
    assert first.config == CONFIG and first.space == LatentSpace(0.18215, ())
    theirs = taesdv_names(CONFIG)
    flat = tree.flatten(first.params)
    assert {theirs[path] for path in flat} == decoder_shapes(CONFIG).keys()
    kernel = flat["up_blocks.1.blocks.1.conv2.kernel"]
    np.testing.assert_array_equal(kernel, random_decoder(CONFIG)["decoder.8.conv.2.weight"].transpose(2, 3, 1, 0))
    import_decoder(released, model / "tiny_decoder")
    second = read_tiny(model / "tiny_decoder")
    assert_same(second.params, first.params)
    assert second.space == latent_space(read_model(model)) and len(second.space.identities) == 2
    assert second.origin["source"] == released.name
    assert_same(read_tiny(model / "tiny_decoder/model.safetensors").params, first.params)
    export_decoder(model / "tiny_decoder", tmp_path / "again.safetensors")
    third = read_tiny(tmp_path / "again.safetensors")
    assert_same(third.params, first.params)
    assert third.space == second.space


def test_pickles_are_read_on_request(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in random_decoder(CONFIG).items()}, tmp_path / "taesdv.pth")
    with pytest.raises(WeightsError, match="taesdv.pth can run code .*--allow_pickle"):
        read_tiny(tmp_path / "taesdv.pth")
    assert read_tiny(tmp_path / "taesdv.pth", allow_pickle=True).config == CONFIG


def foreign(name: str) -> dict[str, np.ndarray]:
    """Weights that are no TAESDV decoder."""
    weights, kernel = random_decoder(CONFIG), np.ones((4, 4, 3, 3), np.float32)
    if name == "TAESD":
        return {k.removeprefix("decoder."): v for k, v in weights.items()}
    if name == "TAESD of diffusers":
        return {k.replace("decoder.", "decoder.layers."): v for k, v in weights.items()}
    if name == "TAEHV":
        return weights | {"decoder.7.conv.weight": kernel}
    if name == "VAE":
        return {"decoder.conv_in.weight": kernel}
    if name == "missing":
        return {k: v for k, v in weights.items() if k != "decoder.4.conv.2.bias"}
    if name == "misshapen":
        return weights | {"decoder.4.conv.2.bias": np.ones(9, np.float32)}
    if name == "surplus":
        return weights | {"decoder.99.scale": np.ones(9, np.float32)}
    if name == "infinite":
        return weights | {"decoder.1.bias": np.full(8, np.inf, np.float32)}
    return {"unet.weight": kernel}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TAESD", "holds TAESD, a decoder of single images without memory: a TAESDV decoder is needed"),
        ("TAESD of diffusers", "holds TAESD, a decoder of single images"),
        ("TAEHV", "holds TAEHV, which makes several frames of one latent"),
        ("VAE", "holds a VAE"),
        ("missing", "is not such a tiny decoder: missing: decoder.4.conv.2.bias"),
        ("misshapen", r"misshapen: decoder.4.conv.2.bias is \(9,\), expected \(8,\)"),
        ("surplus", "unexpected: decoder.99.scale"),
        ("infinite", "NaN or infinite values, the first in decoder.1.bias"),
        ("UNet", "holds no TAESDV decoder"),
    ],
)
def test_other_layouts_are_refused(name, message, tmp_path):
    with pytest.raises(WeightsError, match=message) as caught:
        read_tiny(write(tmp_path / "other.safetensors", foreign(name)))
    assert "\n" not in str(caught.value)


def test_another_latent_space_is_refused(model):
    opened = read_model(model)
    space = latent_space(opened)
    good = decoders.StoredDecoder(Path("d"), CONFIG, params(), space, {})
    check_space(good, opened)

    def refused(message: str, **changes) -> None:
        with pytest.raises(WeightsError, match=message) as caught:
            check_space(dataclasses.replace(good, **changes), opened)
        assert "\n" not in str(caught.value)

    other = dataclasses.replace
    refused("it has 16 latent channels, the VAE of .* 4; distill", config=other(CONFIG, latent_channels=16))
    short = other(CONFIG, block_out_channels=(8, 8, 8), layers_per_block=(1, 1, 1))
    refused("it has 4 pixels per latent cell, .* 8", config=short)
    refused("it has 0.5 as the scale of latents", space=other(space, scaling_factor=0.5))
    refused("was distilled from another VAE", space=other(space, identities=("files:0",)))
    check_space(other(good, space=other(space, identities=())), opened)  # unknown
    check_space(other(good, space=other(space, identities=("files:0", space.identities[1]))), opened)


def test_a_bare_file_has_the_scale_of_sd(released, model):
    """TAESDV's file has no record of its VAE, but it is of no use for a VAE of another scale."""
    about = json.loads((model / "model.json").read_text())
    about["configs"]["vae"]["scaling_factor"] = 0.3
    (model / "model.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match=r"it has 0.18215 as the scale of latents, the VAE of .* 0.3"):
        import_decoder(released, model / "tiny_decoder")
    assert not (model / "tiny_decoder").exists()


def test_the_identity_of_a_vae(model):
    """It is that of the VAE alone, and remains if only one of files and parameters is known or the same."""
    before = latent_space(read_model(model)).identities
    about = json.loads((model / "model.json").read_text())
    sums = about["source"]["sha256"]
    sums |= {name: "0" * 64 for name in sums if name.startswith(("unet/", "image_encoder/")) or "config" in name}
    (model / "model.json").write_text(json.dumps(about))
    assert latent_space(read_model(model)).identities == before
    sums |= {name: "0" * 64 for name in sums if name.startswith("vae/")}
    (model / "model.json").write_text(json.dumps(about))
    after = latent_space(read_model(model)).identities
    assert after[0] != before[0] and after[1] == before[1]
    prints = json.loads((model / "fingerprints.json").read_text())
    path = next(iter(prints["vae"]))
    prints["vae"][path]["float32"] += 1
    (model / "fingerprints.json").write_text(json.dumps(prints))
    assert latent_space(read_model(model)).identities[1] != before[1]


def test_choosing_a_decoder(model, tmp_path):
    opened = read_model(model)
    base = Base(opened.configs["unet"], {}, codec := object.__new__(decoders.SVDCodec), opened, None)
    assert choose_decoder("full", base) is None
    with pytest.raises(WeightsError, match="has no tiny_decoder; train one .*--dst .*model/tiny_decoder"):
        choose_decoder("tiny", base)
    with pytest.raises(WeightsError, match="nowhere does not exist"):
        choose_decoder("nowhere", base)
    with pytest.raises(WeightsError, match="neither a tiny decoder's folder nor a run"):
        choose_decoder(str(tmp_path), base)
    save_tiny(model / "tiny_decoder", CONFIG, params(), latent_space(opened), {"run": "r", "step": 3})
    found = choose_decoder("tiny", base)
    assert found is not None and found.config == CONFIG and choose_decoder(str(model / "tiny_decoder"), base)
    record = found.record()
    assert record["step"] == 3 and len(record["sha256"]) == 64 and record["parameters"] == tree.count(params())
    patched = Base(opened.configs["unet"], {}, PatchCodec(), None, None)
    with pytest.raises(WeightsError, match="this model has the patch codec, which has no decoder network"):
        choose_decoder("tiny", patched)
    del codec


def test_damage_is_noticed(model):
    folder = model / "tiny_decoder"
    save_tiny(folder, CONFIG, params(), LatentSpace())
    with pytest.raises(WeightsError, match="exists already"):
        save_tiny(folder, CONFIG, params(), LatentSpace())
    whole = (folder / "config.json").read_text()
    for wrong, message in (
        ({"_class_name": "AutoencoderTiny"}, "describes no tiny decoder: its _class_name is 'AutoencoderTiny'"),
        ({"config": {"mid_layers": -1}}, "mid_layers is -1"),
        ({"config": {"layers_per_block": [1]}}, "have 4 and 1 levels"),
        ({"latent_space": {"scaling_factor": 0, "identities": []}}, "latent_space needs a scaling_factor"),
        ({"origin": 3}, "origin is no object"),
    ):
        (folder / "config.json").write_text(json.dumps(json.loads(whole) | wrong))
        with pytest.raises(WeightsError, match=message):
            read_tiny(folder)
    (folder / "config.json").write_text(whole)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged: it is not the file of config.json"):
        read_tiny(folder)
