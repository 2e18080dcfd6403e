"""Stability's single file: names by rules, every tensor accounted for, the same bits after the detour."""

import re

import numpy as np
import pytest

from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.weights import sgm
from sfv_jax.weights.diffusers import manifest, reader
from sfv_jax.weights.single_file import save_single_file
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
    """Every tensor has its own place, and reading the places of a file of these shapes gives the manifest back."""
    where, names = sgm.places(component, config), manifest(component, config)
    assert where.keys() == names.keys() and len({(p.name, p.third) for p in where.values()}) == len(names)
    there = sgm.shapes_there(component, config, where)
    assert sum(map(np.prod, there.values())) == sum(map(np.prod, names.values()))

    def empty(name):
        return np.broadcast_to(np.float16(0), there[name])  # no memory

    assert {name: sgm.to_diffusers(place, empty).shape for name, place in where.items()} == names


def test_names_of_the_original():
    """Places read in the sources of VideoUNet, VideoDecoder and open_clip, chosen where a rule could go wrong."""
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


TEMPORAL = re.compile(r"temporal_|time_mixer|time_pos_embed|time_conv_out")  # what Stable Diffusion has not


def test_diffusers_finds_the_spatial_unet():
    """diffusers' own reader of Stable Diffusion files, whose block numbers and spatial names are SVD's too."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    where = {name: place for name, place in sgm.places("unet", FULL["unet"]).items() if not TEMPORAL.search(name)}
    tags = {place.name: torch.tensor(n) for n, place in enumerate(where.values())}
    options = dict(layers_per_block=2, class_embed_type=None, addition_embed_type="text_time")
    found = convert_ldm_unet_checkpoint(tags, config=options)
    expected = {name.replace("spatial_res_block.", ""): tags[place.name] for name, place in where.items()}
    assert found.keys() == expected.keys() and all(found[k] is expected[k] for k in expected)


def test_diffusers_reads_the_spatial_vae(params):
    """As above, with the levels of the decoder in reverse and the attention as convolutions; four levels as in SVD."""
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
    """open_clip's attention is torch's MultiheadAttention: the same output as of transformers' separate q, k and v."""
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
