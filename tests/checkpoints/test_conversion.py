"""Import and export of weights: bit-exact, strict, and complete or absent."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from sfv_jax.checkpoints import exporter, importer
from sfv_jax.checkpoints import model_folder as store
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.weights import pipeline
from sfv_jax.weights.components import from_json, to_json
from sfv_jax.weights.diffusers import load_component, save_component
from sfv_jax.weights.folders import WeightsError, new_folder
from tests.conftest import CONFIGS, noise

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "image_encoder": "model.safetensors",
}


@pytest.fixture
def unet_folder(pipeline_folder, tmp_path):
    """Returns a copy of the UNet's folder, which the test may damage."""
    return shutil.copytree(pipeline_folder / "unet", tmp_path / "unet")


def edit(folder, change):
    """Applies `change(tensors)` to the UNet's weight file."""
    tensors = load_file(folder / FILES["unet"])
    change(tensors)
    save_file(tensors, folder / FILES["unet"], metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same_weights(folder, other, variant=None):
    for component, name in FILES.items():
        name = name.replace(".safetensors", f".{variant}.safetensors") if variant else name
        found, expected = load_file(folder / component / name), load_file(other / component / name)
        assert found.keys() == expected.keys()
        for k in expected:
            assert found[k].dtype == expected[k].dtype and np.array_equal(found[k], expected[k]), k


@pytest.mark.short
def test_round_trip_fp32(pipeline_folder, model_folder, tmp_path):
    exporter.export_model(model_folder, tmp_path / "out")
    assert_same_weights(tmp_path / "out", pipeline_folder)


@pytest.mark.slow
def test_round_trip_fp16_and_reload(reference, pipe, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import StableVideoDiffusionPipeline

    half = reference.pipeline(CONFIGS["unet"], CONFIGS["vae"], CONFIGS["image_encoder"])
    reference.save(half, tmp_path / "in", variant="fp16")
    importer.import_model(tmp_path / "in", tmp_path / "model")
    assert store.read_model(tmp_path / "model").meta["components"]["unet"]["dtype"] == "float16"
    exporter.export_model(tmp_path / "model", tmp_path / "out", variant="fp16")
    assert_same_weights(tmp_path / "out", tmp_path / "in", "fp16")

    again = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", dtype=torch.float16)
    assert again.scheduler.config["sigma_max"] == 700.0 and again.scheduler.config["use_karras_sigmas"]
    inputs = noise(0, 1, 2, 8, 8, 8), np.ones(1), noise(1, 1, 32), np.ones((1, 3))
    found, expected = (reference.run_unet(model, *inputs)[0] for model in (again.unet, half.unet))
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.slow
@pytest.mark.short
def test_export_is_what_diffusers_writes(reference, pipeline_folder, model_folder, tmp_path):
    exporter.export_model(model_folder, tmp_path / "out")
    for component in ("unet", "vae"):
        found, expected = ((f / component / "config.json").read_text() for f in (tmp_path / "out", pipeline_folder))
        assert json.loads(found) == json.loads(expected)


@pytest.mark.slow
def test_source_dtype_can_be_changed(pipeline_folder, tmp_path):
    importer.import_model(pipeline_folder, tmp_path / "model", options=importer.ReadOptions(dtype="bfloat16"))
    params, _, _ = store.load_model(tmp_path / "model", ("vae",))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jax.numpy.bfloat16.dtype}


def test_model_folder_knows_its_origin(model_folder):
    model = store.read_model(model_folder)
    configs, meta = model.configs, model.meta
    assert configs["unet"] == dataclasses.replace(CONFIGS["unet"], temporal_conv="auto")
    assert meta["codec"] == "svd" and meta["scheduler"] == {"sigma_min": 0.002, "sigma_max": 700.0, "rho": 7.0}
    assert meta["source"]["folder"] == "svd-tiny" and len(meta["source"]["sha256"]["unet/config.json"]) == 64
    assert meta["components"]["unet"]["parameters"] == tree.count(tree.abstract(UNet, configs["unet"])[1])


@pytest.mark.slow
def test_load_model_equals_load_component(model_folder, params):
    loaded, _, _ = store.load_model(model_folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


@pytest.mark.slow
def test_load_model_sharded_and_cast(model_folder, params):
    sharding = NamedSharding(Mesh(jax.devices(), ("fsdp",)), P())
    _, shapes = tree.abstract(UNet, CONFIGS["unet"])
    by_rows = jax.tree.map(lambda x: NamedSharding(sharding.mesh, P("fsdp") if x.shape[0] % 8 == 0 else P()), shapes)
    loaded, _, _ = store.load_model(
        model_folder, ("unet", "vae"), dtype=jax.numpy.bfloat16, shardings={"unet": by_rows, "vae": sharding}
    )
    kernel = loaded["unet"]["time_embedding"]["linear_1"]["kernel"]
    assert kernel.sharding.spec == P("fsdp") and kernel.dtype == jax.numpy.bfloat16
    expected = params["unet"]["time_embedding"]["linear_1"]["kernel"].astype(jax.numpy.bfloat16)
    assert np.array_equal(kernel, expected)
    assert len(loaded["vae"]["quant_conv"]["bias"].devices()) == 8


def test_load_codec(model_folder, tmp_path):
    codec = store.load_codec(model_folder)
    assert (codec.downscale, codec.latent_channels, codec.scaling_factor) == (8, 4, 0.18215)
    config = UNetConfig.tiny(in_channels=96, out_channels=48, cross_attention_dim=48)
    unet = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree.abstract(UNet, config)[1])
    patch = PatchCodec(scaling_factor=1.5)
    store.save_model(tmp_path / "m", {"unet": unet}, {"unet": config, "codec": patch}, codec="patch")
    assert store.load_codec(tmp_path / "m") == patch
    with pytest.raises(WeightsError, match="has no vae, image_encoder, only unet"):
        store.load_model(tmp_path / "m")
    with pytest.raises(WeightsError, match="has a patch codec"):
        exporter.export_model(tmp_path / "m", tmp_path / "out")


def test_every_tensor_that_does_not_fit_is_listed(unet_folder):
    def spoil(tensors):
        del tensors["conv_in.weight"], tensors["mid_block.resnets.1.time_mixer.mix_factor"]
        tensors["conv_out.bias"] = np.zeros(5, np.float32)
        tensors["surplus.weight"] = np.zeros(1, np.float32)
        tensors["conv_norm_out.bias"] = np.zeros(32, np.int32)

    edit(unet_folder, spoil)
    with pytest.raises(WeightsError) as caught:
        load_component(unet_folder, "unet")
    assert str(caught.value).splitlines()[1:] == [
        "  misshapen: conv_out.bias is (5,), expected (4,)",
        "  missing: conv_in.weight",
        "  missing: mid_block.resnets.1.time_mixer.mix_factor",
        "  unexpected: surplus.weight",
        "  not floating point: conv_norm_out.bias is I32",
    ]


def test_old_names_are_read(pipeline_folder, params, tmp_path):
    vae = shutil.copytree(pipeline_folder / "vae", tmp_path / "vae")
    tensors = load_file(vae / FILES["vae"])
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for k in [k for k in tensors if ".attentions." in k]:
        for new_word, old_word in old.items():
            if f".{new_word}." in k:
                tensors[k.replace(new_word, old_word)] = tensors.pop(k)
    save_file(tensors, vae / FILES["vae"])
    loaded, _, _ = load_component(vae, "vae")
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params["vae"]))
    bias = "decoder.mid_block.attentions.0.to_q.bias"
    save_file(tensors | {bias: tensors[bias.replace("to_q", "query")]}, vae / FILES["vae"])
    with pytest.raises(WeightsError, match=f"duplicate: .*{bias[:-12]}"):
        load_component(vae, "vae")

    clip = shutil.copytree(pipeline_folder / "image_encoder", tmp_path / "clip")
    tensors = load_file(clip / FILES["image_encoder"])
    tensors["vision_model.embeddings.position_ids"] = np.arange(65)[None]
    save_file(tensors, clip / FILES["image_encoder"])
    load_component(clip, "image_encoder")


def test_truncated_file(unet_folder):
    path = unet_folder / FILES["unet"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=f"{path.name} is cut short"):
        load_component(unet_folder, "unet")


def test_missing_files(unet_folder):
    with pytest.raises(WeightsError, match="holds no diffusion_pytorch_model.fp16.safetensors"):
        load_component(unet_folder, "unet", variant="fp16")
    (unet_folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="config.json does not exist"):
        load_component(unet_folder, "unet")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel, expected a UNetSpatioTemporalCondition"),
        ({"down_block_types": ["DownBlockSpatioTemporal"] * 2}, "down_block_types is"),
        ({"transformer_layers_per_block": 2}, "transformer_layers_per_block is 2, here it must be 1"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block is \[1, 2\]"),
        ({"num_attention_heads": [3, 4]}, "32 channels must divide by 3 heads"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_configs_are_refused(unet_folder, values, message):
    edit_config(unet_folder, **values)
    with pytest.raises(WeightsError, match=message):
        load_component(unet_folder, "unet")


def test_equal_per_level_values_are_accepted():
    data = to_json("unet", CONFIGS["unet"]) | {"layers_per_block": [1, 1], "num_attention_heads": 2}
    config = from_json("unet", data, "here")
    assert config.layers_per_block == 1 and config.num_attention_heads == (2, 2)


def test_activation_of_clip_is_checked():
    data = to_json("image_encoder", CONFIGS["image_encoder"])
    del data["hidden_act"]  # transformers' default, which it does not write, is another one
    with pytest.raises(WeightsError, match="hidden_act is 'quick_gelu', here it must be 'gelu'"):
        from_json("image_encoder", data, "here")


def test_save_refuses_what_diffusers_cannot_hold(params, tmp_path):
    with pytest.raises(WeightsError, match="norm_groups is 8, diffusers has 32"):
        save_component(tmp_path, "unet", params["unet"], dataclasses.replace(CONFIGS["unet"], norm_groups=8))
    with pytest.raises(WeightsError, match=r"do not fit the config:\n  misshapen: conv_out.bias is \(4,\), expected"):
        save_component(tmp_path, "unet", params["unet"], UNetConfig.tiny(out_channels=5))
    huge = params["unet"] | {"conv_out": jax.tree.map(lambda x: x + 1e5, params["unet"]["conv_out"])}
    with pytest.raises(WeightsError, match="conv_out.bias has values that float16 cannot hold"):
        save_component(tmp_path, "unet", huge, CONFIGS["unet"], variant="fp16")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["import", "export"])
def test_interrupted_conversion_leaves_nothing(pipeline_folder, model_folder, tmp_path, monkeypatch, direction):
    def interrupt(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(store if direction == "import" else pipeline, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        if direction == "import":
            importer.import_model(pipeline_folder, tmp_path / "out")
        else:
            exporter.export_model(model_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_destination(pipeline_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(WeightsError, match="out exists already"):
        importer.import_model(pipeline_folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out", overwrite=True):
        _ = 1 / 0
    assert (tmp_path / "out" / "mine.txt").exists()
    importer.import_model(pipeline_folder, tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*.json")) == ["fingerprints.json", "model.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_wrong_folders_are_named(pipeline_folder, model_folder, tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        store.load_model(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="is a diffusers folder. Convert it first: python -m sfv_jax.convert --src"):
        store.load_model(pipeline_folder)
    with pytest.raises(WeightsError, match="no model_index.json"):
        pipeline.open_pipeline(model_folder)
    newer = shutil.copytree(model_folder, tmp_path / "newer")
    meta = json.loads((newer / "model.json").read_text())
    (newer / "model.json").write_text(json.dumps(meta | {"version": 2}))
    with pytest.raises(WeightsError, match="version 2, this program reads version 1"):
        store.load_model(newer)


@pytest.mark.slow
def test_command(pipeline_folder, tmp_path):
    command = [sys.executable, "-m", "sfv_jax.convert", "--src", str(pipeline_folder), "--dst", str(tmp_path / "out")]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == 0 and "1,302,288 parameters" in first.stdout
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith(f"convert: {tmp_path / 'out'} exists already")
    assert "Traceback" not in second.stderr
