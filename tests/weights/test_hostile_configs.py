"""Configs that describe no network, or one that nobody could build: one line, at once, before anything is built."""

import json
import shutil
import time

import numpy as np
import pytest

from sfv_jax.checkpoints.base import read_run
from sfv_jax.checkpoints.importer import import_model
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.runtime.files import FileError
from sfv_jax.weights.components import COMPONENTS, from_json, make_config, to_json
from sfv_jax.weights.diffusers import manifest
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.pipeline import SIGMAS, open_pipeline, save_pipeline
from tests.conftest import CONFIGS
from tests.support import golden

HUGE = [
    ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, which is not a whole number from 1 to 8"),
    ("unet", {"layers_per_block": 0}, "layers_per_block is 0"),
    ("unet", {"layers_per_block": 1.5}, "layers_per_block is 1.5"),
    ("unet", {"layers_per_block": True}, "layers_per_block is True"),
    ("unet", {"layers_per_block": "2"}, "layers_per_block is '2'"),
    ("unet", {"layers_per_block": {"a": 1}}, "layers_per_block is"),
    ("unet", {"block_out_channels": [32] * 10**6}, "block_out_channels is"),
    ("unet", {"block_out_channels": []}, "block_out_channels is"),
    ("unet", {"block_out_channels": 32}, "num_attention_heads|block_out_channels"),
    ("unet", {"block_out_channels": [32, 10**12]}, "block_out_channels is"),
    ("unet", {"num_attention_heads": [0, 4]}, "num_attention_heads is"),
    ("unet", {"num_attention_heads": [[2], 4]}, "num_attention_heads is"),
    ("unet", {"num_frames": -1}, "num_frames is -1"),
    ("unet", {"cross_attention_dim": 10**400}, "cross_attention_dim is 1"),
    ("vae", {"scaling_factor": 0}, "scaling_factor is 0, which is not a finite number above 0"),
    ("vae", {"scaling_factor": 10**400}, "scaling_factor is 1"),
    ("vae", {"scaling_factor": "0.18215"}, "scaling_factor is '0.18215'"),
    ("vae", {"layers_per_block": 10**9}, "layers_per_block is"),
    ("image_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("image_encoder", {"patch_size": 0}, "patch_size is 0"),
    ("image_encoder", {"architectures": {"a": 1}}, "describes a {'a': 1}, expected"),
    ("image_encoder", {"architectures": []}, "expected a CLIPVisionModelWithProjection"),
    ("unet", {"_class_name": "\x1b[2J\nconvert: fine"}, r"describes a \\x1b\[2J\\nconvert: fine, expected"),
]


@pytest.mark.parametrize(("component", "values", "message"), HUGE)
def test_fields(component, values, message):
    began = time.process_time()
    with pytest.raises(WeightsError, match=message) as caught:
        from_json(component, to_json(component, CONFIGS[component]) | values, "config.json")
    assert time.process_time() - began < 2 and "\n" not in str(caught.value) and len(str(caught.value)) < 2500


def test_sizes_that_contradict_each_other():
    """The layers refuse them, in errors of their own."""
    config = make_config(COMPONENTS["vae"].config, {"block_out_channels": [33, 47]}, "here")
    with pytest.raises(WeightsError, match="vae: no network has the sizes of"):
        manifest("vae", config)
    with pytest.raises(WeightsError, match="here: 30 channels must divide by 16 heads"):
        make_config(COMPONENTS["image_encoder"].config, {"hidden_size": 30}, "here")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A pipeline folder and its model folder; tests must not change them."""
    path = tmp_path_factory.mktemp("sources")
    save_pipeline(path / "pipeline", golden.component_params, CONFIGS, SIGMAS)
    import_model(path / "pipeline", path / "model")
    return path


SCHEDULERS = [
    ({"sigma_max": 80}, "sigma_max is 80, SVD's is 700.0: other noise levels are not supported"),
    ({"sigma_max": "700"}, "sigma_max is '700'"),
    ({"sigma_max": None}, "sigma_max is None"),
    ({"sigma_max": [700]}, r"sigma_max is \[700\]"),
    ({"sigma_max": 10**400}, "sigma_max is 1"),
    ({"sigma_min": True}, "sigma_min is True"),
    ({"sigma_min": 0.0002}, "sigma_min is 0.0002"),
    ({"use_karras_sigmas": False}, "use_karras_sigmas is False"),
    ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
]


@pytest.mark.parametrize(("values", "message"), SCHEDULERS, ids=[str(x[0])[:30] for x in SCHEDULERS])
def test_schedulers(sources, values, message, tmp_path):
    folder = shutil.copytree(sources / "pipeline", tmp_path / "pipeline")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(WeightsError, match=message):
        open_pipeline(folder)


@pytest.mark.parametrize("mean", ["0.5", [0.5], [[0.5] * 3], [0.1, 0.2, "x"], {"a": 1}])
def test_normalisation(sources, mean, tmp_path):
    folder = shutil.copytree(sources / "pipeline", tmp_path / "pipeline")
    path = folder / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": mean}))
    with pytest.raises(WeightsError, match="image_mean is"):
        open_pipeline(folder)


MODELS = [
    ({"scheduler": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}}, "sigma_max is 80.0, SVD's is 700.0"),
    ({"scheduler": {"sigma_min": 0.002, "sigma_max": 700.0, "rho": 3.0}}, "rho is 3.0, SVD's is 7.0"),
    ({"scheduler": 7}, "scheduler is 7"),
    ({"codec": "jpeg"}, "codec is jpeg"),
    ({"components": {"../../etc": {}}}, "components is"),
    ({"components": 3}, "components is 3"),
    ({"components": {"unet": {}}, "configs": {}}, "configs is"),
    ({"configs": {"unet": {"layers_per_block": 10**9}}, "components": {"unet": {}}}, "layers_per_block is"),
    ({"configs": {"unet": {"color": 1}}, "components": {"unet": {}}}, "UNetConfig has no color"),
    ({"source": {"sha256": [1]}}, "source is"),
    ({"version": "\x1b[2J"}, "has version"),
]


@pytest.mark.parametrize(("values", "message"), MODELS, ids=[str(x[0])[:40] for x in MODELS])
def test_model_folders(sources, values, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    meta = json.loads((sources / "model" / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(meta | values))
    with pytest.raises(WeightsError, match=message) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[]", "{", '{"unet": {"layers_per_block": 1e9}}', '{"unet": [1]}', '{"model": 3}', "\xff"],
)
def test_networks_of_runs(content, tmp_path):
    (tmp_path / "network.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(FileError, match="network.json"):
        read_run(tmp_path)


def test_a_lone_file_beside_a_hostile_base(sources, tmp_path):
    """Names of components are paths: others than the known ones are refused before anything is copied."""
    base = shutil.copytree(sources / "model", tmp_path / "base")
    meta = json.loads((base / "model.json").read_text())
    meta["components"]["../../secret"] = meta["components"]["vae"]
    meta["configs"]["../../secret"] = meta["configs"]["vae"]
    (base / "model.json").write_text(json.dumps(meta))
    with pytest.raises(WeightsError, match="components is"):
        import_model(sources / "pipeline" / "unet", tmp_path / "out", base=base)
    assert np.all([not (tmp_path / "out").exists()])
