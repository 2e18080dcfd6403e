"""Stability's single file: names by rules, every tensor checked, the same bits after a round trip."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sfv_jax.checkpoints import exporter
from sfv_jax.checkpoints import model_folder as store
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.weights import sgm
from sfv_jax.weights import single_file as single_file_module
from sfv_jax.weights.diffusers import manifest, reader
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.lazy import read_all
from sfv_jax.weights.reader import open_weights
from sfv_jax.weights.single_file import lazy_single_file, open_single_file, save_single_file
from tests.conftest import CONFIGS, noise

FULL = {"unet": UNetConfig.svd(), "vae": VAEConfig.svd(), "image_encoder": CLIPConfig.svd()}
WIDE = UNetConfig.tiny(block_out_channels=(32, 64, 64), num_attention_heads=(2, 4, 4), layers_per_block=2)


@pytest.fixture(scope="module")
def single_file(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("sgm") / "svd-tiny.safetensors"
    save_single_file(path, params.__getitem__, CONFIGS)
    return path


@pytest.mark.parametrize(("component", "config"), [*FULL.items(), ("unet", WIDE)], ids=[*FULL, "three levels"])
def test_names_are_a_bijection(component, config):
    """Every tensor has a place of its own, and tensors read from places of these shapes have the manifest's shapes."""
    where, names = sgm.places(component, config), manifest(component, config)
    assert where.keys() == names.keys() and len({(p.name, p.third) for p in where.values()}) == len(names)
    there = sgm.shapes_there(component, config, where)
    assert sum(map(np.prod, there.values())) == sum(map(np.prod, names.values()))

    def empty(name):
        return np.broadcast_to(np.float16(0), there[name])  # no memory

    assert {name: sgm.to_diffusers(place, empty).shape for name, place in where.items()} == names


def test_names_of_the_original():
    """Places taken from the sources of VideoUNet, VideoDecoder and open_clip, chosen where a rule could fail."""
    expected = {
        "unet": {
            "time_embedding.linear_2.bias": "time_embed.2.bias",
            "add_embedding.linear_1.weight": "label_emb.0.0.weight",
            "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
            "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
            "down_blocks.3.resnets.1.temporal_res_block.conv2.bias": "input_blocks.11.0.time_stack.out_layers.3.bias",
            "mid_block.attentions.0.time_pos_embed.linear_2.weight": "middle_block.1.time_pos_embed.2.weight",
            "mid_block.resnets.1.time_mixer.mix_factor": "middle_block.2.time_mixer.mix_factor",
            "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
            "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
            "up_blocks.3.attentions.2.temporal_transformer_blocks.0.ff_in.net.0.proj.weight": (
                "output_blocks.11.1.time_stack.0.ff_in.net.0.proj.weight"
            ),
            "up_blocks.3.resnets.2.spatial_res_block.time_emb_proj.weight": "output_blocks.11.0.emb_layers.1.weight",
            "conv_norm_out.weight": "out.0.weight",
        },
        "vae": {
            "decoder.up_blocks.0.upsamplers.0.conv.weight": "first_stage_model.decoder.up.3.upsample.conv.weight",
            "decoder.up_blocks.3.resnets.0.spatial_res_block.conv_shortcut.bias": (
                "first_stage_model.decoder.up.0.block.0.nin_shortcut.bias"
            ),
            "decoder.mid_block.resnets.1.time_mixer.mix_factor": "first_stage_model.decoder.mid.block_2.mix_factor",
            "decoder.mid_block.resnets.0.temporal_res_block.norm2.weight": (
                "first_stage_model.decoder.mid.block_1.time_stack.out_layers.0.weight"
            ),
            "decoder.time_conv_out.weight": "first_stage_model.decoder.conv_out.time_mix_conv.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight": (
                "conditioner.embedders.3.encoder.encoder.mid.attn_1.proj_out.weight"
            ),
            "encoder.down_blocks.2.downsamplers.0.conv.bias": (
                "conditioner.embedders.3.encoder.encoder.down.2.downsample.conv.bias"
            ),
            "quant_conv.weight": "conditioner.embedders.3.encoder.quant_conv.weight",
        },
        "image_encoder": {
            "visual_projection.weight": "proj",
            "vision_model.embeddings.position_embedding.weight": "positional_embedding",
            "vision_model.encoder.layers.31.self_attn.v_proj.bias": "transformer.resblocks.31.attn.in_proj_bias",
            "vision_model.encoder.layers.0.mlp.fc2.weight": "transformer.resblocks.0.mlp.c_proj.weight",
        },
    }
    prefixes = {"unet": sgm.UNET, "vae": "", "image_encoder": sgm.CLIP}
    for component, names in expected.items():
        where = sgm.places(component, FULL[component])
        assert {name: where[name].name for name in names} == {k: prefixes[component] + v for k, v in names.items()}


TEMPORAL = re.compile(r"temporal_|time_mixer|time_pos_embed|time_conv_out")  # names that Stable Diffusion lacks


def test_diffusers_finds_the_spatial_unet():
    """diffusers' reader of Stable Diffusion files agrees; its block numbers and spatial names apply to SVD too."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    where = {name: place for name, place in sgm.places("unet", FULL["unet"]).items() if not TEMPORAL.search(name)}
    tags = {place.name: torch.tensor(n) for n, place in enumerate(where.values())}
    options = dict(layers_per_block=2, class_embed_type=None, addition_embed_type="text_time")
    found = convert_ldm_unet_checkpoint(tags, config=options)
    expected = {name.replace("spatial_res_block.", ""): tags[place.name] for name, place in where.items()}
    assert found.keys() == expected.keys() and all(found[k] is expected[k] for k in expected)


def test_diffusers_reads_the_spatial_vae(params):
    """The same for the VAE: decoder levels in reverse, attention as convolutions, four levels as in SVD."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = CONFIGS["vae"]
    _, read = reader("vae", params["vae"], config)
    where = {name: place for name, place in sgm.places("vae", config).items() if not TEMPORAL.search(name)}
    ldm = {
        name.replace(sgm.CONDITIONER, sgm.FIRST_STAGE): torch.from_numpy(np.array(x))
        for name, x in sgm.from_diffusers(where, read)
    }
    types = ["block"] * len(config.block_out_channels)
    found = convert_ldm_vae_checkpoint(ldm, config=dict(down_block_types=types, up_block_types=types))
    assert found.keys() == {name.replace("spatial_res_block.", "") for name in where}
    for name in where:
        assert np.array_equal(found[name.replace("spatial_res_block.", "")], read(name)), name


def test_torch_reads_the_fused_attention(pipe, params):
    """torch's MultiheadAttention, which open_clip uses, matches the separate q, k and v of transformers."""
    torch = pytest.importorskip("torch")
    config = CONFIGS["image_encoder"]
    _, read = reader("image_encoder", params["image_encoder"], config)
    tensors = dict(sgm.from_diffusers(sgm.places("image_encoder", config), read))
    prefix = f"{sgm.CLIP}transformer.resblocks.1.attn."
    fused = torch.nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
    mine = {k.removeprefix(prefix): torch.from_numpy(np.array(v)) for k, v in tensors.items() if k.startswith(prefix)}
    fused.load_state_dict(mine)
    x = torch.from_numpy(noise(0, 2, 5, config.hidden_size))
    expected = pipe.image_encoder.vision_model.encoder.layers[1].self_attn(x)[0]
    with torch.no_grad():
        np.testing.assert_allclose(fused(x, x, x)[0], expected, atol=1e-5)
    assert tensors[f"{sgm.CLIP}proj"].shape == (config.hidden_size, config.projection_dim)


def differences(single, params) -> list[str]:
    """Returns the names of the components whose bits differ from those of `params`."""
    found = {name: tree.flatten(read_all(lazy_single_file(single, name))) for name in CONFIGS}
    expected = {name: tree.flatten(params[name]) for name in CONFIGS}
    assert all(found[name].keys() == expected[name].keys() for name in CONFIGS)
    return [k for k in CONFIGS if not all(np.array_equal(found[k][p], x) for p, x in expected[k].items())]


def edit(source, target, change):
    """Writes `source` as `target` after `change(tensors)`."""
    tensors = load_file(source)
    with safe_open(source, framework="np") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, target, metadata=metadata)
    return target


def test_round_trip(single_file, params):
    single = open_single_file(open_weights(single_file))
    plain = {"unet": dict(temporal_conv="auto"), "vae": dict(temporal_conv="auto"), "image_encoder": {}}
    assert single.configs == {name: dataclasses.replace(CONFIGS[name], **plain[name]) for name in CONFIGS}
    assert single.notes == [] and differences(single, params) == []


def test_a_wrong_rule_is_noticed(single_file, params, monkeypatch):
    """Two decoder levels are exchanged, as if they were not counted in reverse, and q is exchanged with k."""
    right = sgm.places("vae", CONFIGS["vae"])

    def exchanged(component, config, **kw):
        found = places(component, config, **kw)
        if component == "vae":
            swap = {"up.2.block.1.": "up.3.block.1.", "up.3.block.1.": "up.2.block.1."}  # of the same width
            found = {
                k: sgm.Place(re.sub(r"up\.[23]\.block\.1\.", lambda m: swap[m[0]], v.name), v.form, v.third)
                for k, v in found.items()
            }
        if component == "image_encoder":
            found = {k: sgm.Place(v.name, v.form, {0: 1, 1: 0}.get(v.third, v.third)) for k, v in found.items()}
        return found

    places = sgm.places
    monkeypatch.setattr(sgm, "places", exchanged)
    assert sgm.places("vae", CONFIGS["vae"]).keys() == right.keys()
    assert differences(open_single_file(open_weights(single_file)), params) == ["vae", "image_encoder"]


def test_configs_of_the_released_sizes():
    """Shapes of full-size files determine the configs; without our header, heads have SVD's widths, 64 and 80."""
    shapes = {}
    for name, config in FULL.items():
        shapes |= sgm.shapes_there(name, config, sgm.places(name, config))
    found = {name: single_file_module._infer(name, shapes, {}, None, "svd.safetensors") for name in FULL}
    assert found == FULL


def test_frames_are_told_by_flag_header_or_name(single_file, tmp_path):
    header = open_single_file(open_weights(single_file))
    assert header.configs["unet"].num_frames == CONFIGS["unet"].num_frames
    assert open_single_file(open_weights(single_file), num_frames=9).configs["unet"].num_frames == 9
    tensors = load_file(single_file)
    for name, frames in (("svd", 14), ("svd_xt", 25)):
        untold = {"unet": {"num_attention_heads": [2, 4]}, "image_encoder": {"num_attention_heads": 2}}
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata={"sfv_jax": json.dumps(untold)})
        single = open_single_file(open_weights(path))
        assert single.configs["unet"].num_frames == frames
        assert f"{frames} frames, inferred from the name" in single.notes[0]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"attention heads of unet cannot be inferred from its widths \(32, 64\)"):
        open_single_file(open_weights(path))


def test_every_tensor_is_accounted_for(single_file, params, tmp_path):
    def as_released(tensors):
        """Adds other tensors of the original: the text side of open_clip, and the conditioner's decoder."""
        for name in ("logit_scale", "token_embedding.weight", "ln_final.bias", "transformer.resblocks.0.ln_1.bias"):
            tensors[f"conditioner.embedders.0.open_clip.model.{name}"] = np.zeros(3, np.float32)
        tensors[f"{sgm.CONDITIONER}decoder.conv_in.weight"] = np.zeros(3, np.float32)
        tensors[f"{sgm.CONDITIONER}post_quant_conv.bias"] = np.zeros(4, np.float32)

    single = open_single_file(open_weights(edit(single_file, tmp_path / "released.safetensors", as_released)))
    assert single.notes == ["left out 4 tensors: CLIP's text side", "left out 2 tensors: the conditioner's decoder"]
    assert differences(single, params) == []

    def spoil(tensors):
        del tensors[f"{sgm.UNET}out.2.bias"]
        tensors[f"{sgm.UNET}out.3.bias"] = np.zeros(4, np.float32)
        tensors[f"{sgm.CLIP}ln_post.bias"] = np.zeros(5, np.float32)
        tensors["conditioner.embedders.5.weight"] = np.zeros(1, np.float32)
        tensors[f"{sgm.UNET}out.0.bias"] = tensors[f"{sgm.UNET}out.0.bias"].astype(np.int32)

    with pytest.raises(WeightsError) as caught:
        open_single_file(open_weights(edit(single_file, tmp_path / "spoilt.safetensors", spoil)))
    assert str(caught.value).splitlines()[1:] == [
        f"  misshapen: {sgm.CLIP}ln_post.bias is (5,), expected (32,)",
        f"  missing: {sgm.UNET}out.2.bias",
        "  unexpected: conditioner.embedders.5.weight",
        f"  unexpected: {sgm.UNET}out.3.bias",
        f"  not floating point: {sgm.UNET}out.0.bias is I32",
    ]


def test_other_files_are_named(single_file, pipeline_folder, tmp_path):
    with pytest.raises(WeightsError, match="is not a single file of SVD: no tensor begins with model.diffusion_model"):
        open_single_file(open_weights(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"))

    def frame_wise(tensors):
        for name in [name for name in tensors if "decoder" in name and re.search("time_|mix_factor", name)]:
            del tensors[name]

    with pytest.raises(WeightsError, match="no temporal decoder: take the file without image_decoder"):
        open_single_file(open_weights(edit(single_file, tmp_path / "svd_image_decoder.safetensors", frame_wise)))
    broken = tmp_path / "broken.safetensors"
    save_file(load_file(single_file), broken, metadata={"sfv_jax": "[1]"})
    with pytest.raises(WeightsError, match="the entry sfv_jax of its header is broken"):
        open_single_file(open_weights(broken))


def test_the_two_encoders(single_file, params, tmp_path):
    """The first stage's copy lacks quant_conv, is compared, and replaces the conditioner's where that is missing."""

    def blur(tensors):
        tensors["first_stage_model.encoder.norm_out.bias"] += 1e-6
        tensors["first_stage_model.encoder.conv_out.weight"] *= 1.1

    single = open_single_file(open_weights(edit(single_file, tmp_path / "blurred.safetensors", blur)))
    assert re.fullmatch("the encoder of the conditioner; that of the first stage differs in 2: .*", single.notes[0])
    assert differences(single, params) == []

    def bare(tensors):
        for name in [name for name in tensors if name.startswith(sgm.CONDITIONER)]:
            del tensors[name]

    single = open_single_file(open_weights(edit(single_file, tmp_path / "bare.safetensors", bare)))
    assert "identity as quant_conv" in single.notes[0]
    vae = read_all(lazy_single_file(single, "vae"))
    assert np.array_equal(vae["quant_conv"]["kernel"][0, 0], np.eye(8))
    last, mix = params["vae"]["encoder"]["conv_out"], params["vae"]["quant_conv"]
    for name, value in (
        ("kernel", last["kernel"] @ mix["kernel"]),
        ("bias", last["bias"] @ mix["kernel"][0, 0] + mix["bias"]),
    ):
        np.testing.assert_allclose(vae["encoder"]["conv_out"][name], value, atol=1e-6)
    rest = {**params["vae"]["encoder"], "conv_out": vae["encoder"]["conv_out"]}
    assert jax.tree.all(jax.tree.map(np.array_equal, vae["encoder"], rest))


@pytest.mark.slow
def test_command(single_file, params, tmp_path):
    """The command converts a single file to a model folder, and the exporter writes the same file again."""
    command = [sys.executable, "-m", "sfv_jax.convert", "--src", str(single_file), "--dst", str(tmp_path / "model")]
    done = subprocess.run([*command, "--num_frames=5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1,302,288 parameters" in done.stdout, done.stderr
    loaded, configs, meta = store.load_model(tmp_path / "model")
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params)) and configs["unet"].num_frames == 5
    assert list(meta["source"]["sha256"]) == ["svd-tiny.safetensors"] and meta["scheduler"]["sigma_max"] == 700.0
    exporter.export_model(tmp_path / "model", tmp_path / "again.safetensors", what="comfyui")
    found, expected = load_file(tmp_path / "again.safetensors"), load_file(single_file)
    assert found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in expected)
    with pytest.raises(WeightsError, match="again.safetensors exists already"):
        exporter.export_model(tmp_path / "model", tmp_path / "again.safetensors", what="comfyui")
    (tmp_path / "again.safetensors").unlink()
    with pytest.raises(WeightsError, match="again.md exists already"):
        exporter.export_model(tmp_path / "model", tmp_path / "again.safetensors", what="comfyui")
    with pytest.raises(WeightsError, match="must end in .safetensors"):
        exporter.export_model(tmp_path / "model", tmp_path / "other", what="comfyui")
