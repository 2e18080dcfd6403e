"""The ComfyUI workflow of an export: nodes and inputs as in ComfyUI's source, links to outputs of the right type."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from sfv_jax.checkpoints import exporter
from sfv_jax.checkpoints.base import describe_run
from sfv_jax.checkpoints.card import FEW_STEPS
from sfv_jax.checkpoints.run import Checkpoints
from sfv_jax.checkpoints.workflow import Video, workflow
from sfv_jax.diffusion import edm
from sfv_jax.weights.reader import open_weights
from sfv_jax.weights.single_file import open_single_file, save_single_file
from tests.conftest import CONFIGS

# Inputs and outputs of ComfyUI's nodes (nodes.py, comfy_extras/nodes_video_model.py, comfy_extras/nodes_images.py).
INT, FLOAT, TEXT = int, float, str
NODES = {
    "ImageOnlyCheckpointLoader": ({"ckpt_name": TEXT}, ("MODEL", "CLIP_VISION", "VAE")),
    "LoadImage": ({"image": TEXT}, ("IMAGE", "MASK")),
    "ImageScale": (
        {"image": "IMAGE", "upscale_method": TEXT, "width": INT, "height": INT, "crop": TEXT},
        ("IMAGE",),
    ),
    "SVD_img2vid_Conditioning": (
        {"clip_vision": "CLIP_VISION", "init_image": "IMAGE", "vae": "VAE", "width": INT, "height": INT}
        | {"video_frames": INT, "motion_bucket_id": INT, "fps": INT, "augmentation_level": FLOAT},
        ("CONDITIONING", "CONDITIONING", "LATENT"),
    ),
    "VideoLinearCFGGuidance": ({"model": "MODEL", "min_cfg": FLOAT}, ("MODEL",)),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
        | {"seed": INT, "steps": INT, "cfg": FLOAT, "sampler_name": TEXT, "scheduler": TEXT, "denoise": FLOAT},
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveAnimatedWEBP": (
        {"images": "IMAGE", "filename_prefix": TEXT, "fps": FLOAT, "lossless": bool, "quality": INT, "method": TEXT},
        (),
    ),
}


def check(graph: dict) -> dict:
    """Checks every node and link; returns the inputs by kind of node."""
    for node in graph.values():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs.keys(), node
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source, output = value
                assert NODES[graph[source]["class_type"]][1][output] == inputs[name], (node, name)
            else:
                assert type(value) is inputs[name], (node, name)
    return {node["class_type"]: node["inputs"] for node in graph.values()}


@pytest.mark.parametrize("one_step", [True, False])
def test_nodes_and_links(one_step):
    graph = json.loads(json.dumps(workflow("sfv.safetensors", 25, Video(), one_step=one_step)))
    inputs = check(graph)
    assert inputs.keys() == NODES.keys() - ({"VideoLinearCFGGuidance"} if one_step else set())
    sampler, condition = inputs["KSampler"], inputs["SVD_img2vid_Conditioning"]
    if one_step:
        assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"]) == (1, 1.0, "lcm")
    assert sampler["scheduler"] == "karras" and sampler["denoise"] == 1.0
    assert (condition["width"], condition["height"], condition["video_frames"]) == (1024, 576, 25)
    assert (condition["motion_bucket_id"], condition["fps"], condition["augmentation_level"]) == (127, 7, 0.01)


def test_levels_that_comfyui_visits():
    """The numbers of the card: Karras levels of n steps, of which KSamplerAdvanced makes the first, and then 0."""
    four = edm.sampling_sigmas(4)
    for end in (1, 2, 3):
        np.testing.assert_allclose([*four[:end], 0], edm.few_step_sigmas(end), rtol=1e-6)
    np.testing.assert_allclose(edm.sampling_sigmas(2), [700, 0.002, 0], rtol=1e-6)
    np.testing.assert_allclose(edm.sampling_sigmas(3), [700, 15.59, 0.002, 0], rtol=1e-5)
    assert all(f" {level}" in FEW_STEPS for level in ("700,", "70.54", "2.269", "15.59", "0.002"))


@pytest.mark.slow
def test_an_export_brings_its_workflow(model_folder, params, tmp_path):
    """Size, rate and conditions are those of the run's latent cache; a model folder has SVD's."""
    exporter.export_model(model_folder, tmp_path / "base.safetensors", what="comfyui")
    base = check(json.loads((tmp_path / "base.json").read_text()))
    assert base["ImageOnlyCheckpointLoader"]["ckpt_name"] == "base.safetensors" and base["KSampler"]["steps"] == 25
    cache, run = tmp_path / "cache", tmp_path / "run"
    cache.mkdir()
    settings = dict(height=448, width=768, fps=8.0, motion_bucket_id=90.0, noise_aug_strength=0.0, seed=3)
    (cache / "manifest.json").write_text(json.dumps({"settings": settings}))
    run.mkdir()
    describe_run(run, CONFIGS["unet"], None, model_folder)
    data = {"source": "latents", "path": str(cache), "split": "train"}
    (run / "config.json").write_text(json.dumps({"method": "sfv", "steps": 9, "data": data}))
    checkpoints = Checkpoints(run)
    checkpoints.save(3, {"ema": params["unet"], "generator": params["unet"]}, {"position": 0})
    checkpoints.close()
    exporter.export_model(run, tmp_path / "sfv.safetensors", what="comfyui", variant="fp16")
    inputs = check(json.loads((tmp_path / "sfv.json").read_text()))
    condition = inputs["SVD_img2vid_Conditioning"]
    assert [condition[k] for k in ("width", "height", "fps", "motion_bucket_id")] == [768, 448, 8, 90]
    assert condition["augmentation_level"] == 0 and inputs["SaveAnimatedWEBP"]["fps"] == 8
    assert inputs["KSampler"]["steps"] == 1
    card = (tmp_path / "sfv.md").read_text()
    for fact in ("`sfv.json`", "768 x 448", "fps 8", "end_at_step 2 or 3", "ComfyUI 0.12", "sampler lcm (or euler)"):
        assert fact in card, fact


def test_the_product_with_quant_conv_is_exact(params, tmp_path):
    """In an fp16 file it is fp32: rounded, it would be as wrong as fp16 is."""
    half = {name: {k: v for k, v in x.items()} for name, x in params.items()}
    save_single_file(tmp_path / "half.safetensors", half.__getitem__, CONFIGS, variant="fp16")
    save_single_file(tmp_path / "full.safetensors", half.__getitem__, CONFIGS)
    found, expected = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "full.safetensors")
    wide = {name for name, x in found.items() if x.dtype == np.float32}
    assert wide == {f"first_stage_model.encoder.conv_out.{leaf}" for leaf in ("weight", "bias")}
    assert all(np.array_equal(found[name], expected[name]) for name in wide)
    rounded = expected["first_stage_model.encoder.conv_out.weight"]
    assert np.abs(rounded.astype(np.float16) - rounded).max() > 1e-5 * np.abs(rounded).max()
    assert open_single_file(open_weights(tmp_path / "half.safetensors")).notes == []
