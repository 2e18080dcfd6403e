"""Files that ComfyUI's nodes write: all networks, or one, with or without the prefix of a whole file.

`comfyui_names.json` contains the names and shapes of the file that ComfyUI's checkpoint node wrote of a small SVD.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sfv_jax.checkpoints import importer
from sfv_jax.checkpoints.model_folder import encoders_identity, load_model, read_model
from sfv_jax.models import tree
from sfv_jax.weights import sgm
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.lazy import read_all
from sfv_jax.weights.pipeline import SIGMAS, save_pipeline
from sfv_jax.weights.reader import open_weights
from sfv_jax.weights.single_file import components_there, lazy_single_file, open_single_file
from tests.conftest import CONFIGS
from tests.support import golden

NAMES = json.loads((Path(__file__).parent / "comfyui_names.json").read_text())
SCALARS = {f"{sgm.SIGMA}sigma_max": np.float32(700), f"{sgm.SIGMA}sigma_min": np.float32(0.002)}


@pytest.fixture(scope="module")
def written():
    """The tensors of ComfyUI's file with random numbers, and SVD's noise levels."""
    rng = np.random.default_rng(5)
    numbers = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in NAMES.items()}
    return numbers | {k: np.asarray(v) for k, v in SCALARS.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder with networks of the same sizes and other numbers."""
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(folder / "pipeline", golden.component_params, CONFIGS, SIGMAS)
    importer.import_model(folder / "pipeline", folder / "model")
    return folder / "model"


def open_clip(written: dict) -> dict:
    """Returns the CLIP tower of `written` with open_clip's names, fused attention and transposed projection."""
    there = {k.removeprefix(sgm.CLIP): v for k, v in written.items() if k.startswith(sgm.CLIP)}
    words = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.patch_embedding": "conv1",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.pre_layrnorm": "ln_pre",
        "vision_model.post_layernorm": "ln_post",
        "vision_model.encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    found = {"proj": there.pop("visual_projection.weight").T.copy()}
    for name in [name for name in there if ".self_attn.q_proj." in name]:
        parts = [there.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        there[name.replace("self_attn.q_proj.", "attn.in_proj_")] = np.concatenate(parts)
    for name, value in there.items():
        for word, other in words.items():
            name = name.replace(word, other)
        found[name] = value
    return found


@pytest.fixture(scope="module")
def usual(written, tmp_path_factory):
    """The parameters of the same numbers in the form of Stability's file, with head counts in its header."""
    path = tmp_path_factory.mktemp("usual") / "svd.safetensors"
    rest = {k: v for k, v in written.items() if not k.startswith((sgm.CLIP, sgm.SIGMA))}
    clip = {sgm.CLIP + name: value for name, value in open_clip(written).items()}
    told = {"unet": {"num_attention_heads": [2, 4], "num_frames": 4}, "image_encoder": {"num_attention_heads": 2}}
    save_file(rest | clip, path, metadata={"sfv_jax": json.dumps(told)})
    single = open_single_file(open_weights(path))
    return {name: tree.flatten(read_all(lazy_single_file(single, name))) for name in CONFIGS}


def find(tensors: dict, folder: Path, base: Path | None, **options) -> tuple[dict, dict]:
    """Returns the networks that are read from a file of `tensors`, and the paths of those to copy from `base`."""
    path = folder / "ComfyUI_00001_.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "modelspec.title": "svd"})
    found = importer._find(path, base, importer.ReadOptions(**options))
    read = {k: tree.flatten(read_all(x)) for k, x in found.params.items() if not isinstance(x, Path)}
    copied = {k: x for k, x in found.params.items() if isinstance(x, Path)}
    whole = len(read) == 3
    assert list(found.files) == ([path.name] if whole else [f"{name}/{path.name}" for name in read])
    assert found.scheduler["sigma_max"] == 700.0 and found.configs["unet"].num_attention_heads == (2, 4)
    assert all(x == base / name for name, x in copied.items())
    return read, copied


def same(found: dict, expected: dict) -> list[str]:
    """Returns the names of the components of `found` whose bits are those of `expected`."""
    return [n for n in found if all(np.array_equal(found[n][k], x) for k, x in expected[n].items())]


def test_all_networks(written, base, usual, tmp_path):
    """The whole way, to a model folder; nothing of the base remains but the head counts."""
    path = tmp_path / "ComfyUI_00001_.safetensors"
    save_file(written, path)
    notes = importer.import_model(path, tmp_path / "out", base=base)
    params, configs, meta = load_model(tmp_path / "out")
    assert same({k: tree.flatten(v) for k, v in params.items()}, usual) == ["unet", "vae", "image_encoder"]
    assert list(meta["source"]["sha256"]) == [path.name] and configs["unet"].num_frames == 4
    assert notes == ["the encoder of the first stage, with an identity as quant_conv: the file has no other"]


def only(written: dict, *starts: str, **renamed: str) -> dict:
    """Returns the tensors of `written` that begin with one of `starts`, whose keys `renamed` replaces."""
    found = {k: v for k, v in written.items() if k.startswith(starts)}
    for old, new in renamed.items():
        prefix = {"unet": sgm.UNET, "vae": sgm.FIRST_STAGE, "clip": sgm.CLIP}[old]
        found = {new + k.removeprefix(prefix) if k.startswith(prefix) else k: v for k, v in found.items()}
    return found


PARTS = {
    "UNet with prefix": (("unet",), lambda w: only(w, sgm.UNET, sgm.SIGMA)),
    "UNet without prefix": (("unet",), lambda w: only(w, sgm.UNET, unet="")),
    "UNet with half the prefix": (("unet",), lambda w: only(w, sgm.UNET, sgm.SIGMA, unet="diffusion_model.")),
    "VAE with prefix": (("vae",), lambda w: only(w, sgm.FIRST_STAGE)),
    "VAE without prefix": (("vae",), lambda w: only(w, sgm.FIRST_STAGE, vae="")),
    "CLIP with prefix": (("image_encoder",), lambda w: only(w, sgm.CLIP)),
    "CLIP of transformers": (("image_encoder",), lambda w: only(w, sgm.CLIP, clip="")),
    "CLIP of open_clip": (("image_encoder",), open_clip),
    "CLIP of open_clip's whole model": (
        ("image_encoder",),
        lambda w: {f"visual.{k}": v for k, v in open_clip(w).items()} | {"token_embedding.weight": np.zeros(3)},
    ),
    "UNet and VAE": (("unet", "vae"), lambda w: only(w, sgm.UNET, sgm.FIRST_STAGE)),
    "VAE and CLIP": (("vae", "image_encoder"), lambda w: only(w, sgm.FIRST_STAGE, sgm.CLIP, vae="", clip="")),
}


@pytest.mark.parametrize("case", PARTS)
def test_some_networks(case, written, base, usual, tmp_path):
    """The networks of the file are those of the usual form, the others are those of the base."""
    names, make = PARTS[case]
    read, copied = find(make(written), tmp_path, base)
    assert same(read, usual) == list(names) and {*read, *copied} == set(CONFIGS)


def test_a_unet_alone_keeps_the_encoders(written, base, usual, tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file(only(written, sgm.UNET, sgm.SIGMA), path)
    importer.import_model(path, tmp_path / "out", base=base)
    params, _, meta = load_model(tmp_path / "out")
    assert same({"unet": tree.flatten(params["unet"])}, usual) == ["unet"]
    expected = load_model(base)[0]
    assert all(jax.tree.all(jax.tree.map(np.array_equal, params[k], expected[k])) for k in ("vae", "image_encoder"))
    assert encoders_identity(meta) == encoders_identity(read_model(base).meta) != ""
    assert [name for name in meta["source"]["sha256"] if name.startswith("unet/")] == ["unet/unet.safetensors"]


def test_half_precision(written, base, usual, tmp_path):
    """Files in fp16 too, in which the noise levels are rounded."""
    read, _ = find({k: v.astype(np.float16) for k, v in written.items()}, tmp_path, base, dtype="float32")
    for name, flat in read.items():
        assert all(np.array_equal(flat[k], x.astype(np.float16)) for k, x in usual[name].items()), name


def test_a_network_of_diffusers_alone(base, tmp_path):
    """A VAE, as diffusers writes it, beside the base's other networks."""
    tensors = {name: 2 * value for name, value in golden.component_weights("vae").items()}
    read, copied = find(tensors, tmp_path, base)
    expected = tree.flatten(golden.component_params("vae"))
    assert list(read) == ["vae"] and set(copied) == {"unet", "image_encoder"}
    assert all(np.array_equal(read["vae"][k], 2 * np.asarray(x)) for k, x in expected.items())


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ((sgm.UNET,), "is a UNet alone: pass --base MODEL_FOLDER, .* whose VAE and CLIP tower it is to have"),
        ((sgm.FIRST_STAGE,), "is a VAE alone: pass --base MODEL_FOLDER, .* whose UNet and CLIP tower"),
        ((sgm.CLIP,), "is a CLIP tower alone: pass --base MODEL_FOLDER, .* whose UNet and VAE"),
        ((sgm.FIRST_STAGE, sgm.CLIP), "has no UNet: pass --base MODEL_FOLDER"),
    ],
)
def test_what_is_missing_is_named(written, starts, message, tmp_path, monkeypatch):
    monkeypatch.setattr("sfv_jax.weights.single_file.HEAD_DIM", {"unet": 16, "image_encoder": 16})
    save_file(only(written, *starts), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=message) as caught:
        importer.import_model(tmp_path / "x.safetensors", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sigma_max", np.float32(80), "sigma_max is 80.0, SVD's is 700.0"),
        ("sigma_min", np.float32(0.02), r"sigma_min is 0.019\d*, SVD's is 0.002"),
        ("sigma_max", np.float32(np.nan), "sigma_max is nan"),
        ("sigma_max", np.int32(700), "sigma_max is"),
        ("sigma_max", np.ones(2, np.float32), r"sigma_max is \(2,\)"),
        ("sigma_data", np.float32(1), "sigma_data is 1.0, SVD's is absent"),
    ],
)
def test_other_noise_levels(written, base, name, value, message, tmp_path):
    tensors = only(written, sgm.UNET, sgm.SIGMA) | {f"{sgm.SIGMA}{name}": np.asarray(value)}
    with pytest.raises(WeightsError, match=message):
        find(tensors, tmp_path, base)
    assert not (tmp_path / "out").exists()


def test_a_tensor_twice_or_too_many(written, base, tmp_path):
    twice = only(written, sgm.UNET) | {"input_blocks.0.0.weight": written[f"{sgm.UNET}input_blocks.0.0.weight"]}
    with pytest.raises(WeightsError, match="input_blocks.0.0.weight' and '.* are the same tensor"):
        find(twice, tmp_path, base)
    with pytest.raises(WeightsError, match="unexpected: model.diffusion_model.input_blocks.9.0.weight"):
        find(only(written, sgm.UNET) | {f"{sgm.UNET}input_blocks.9.0.weight": np.zeros(1, np.float32)}, tmp_path, base)


def test_networks_that_do_not_go_together(written, base, tmp_path):
    other = {k: v for k, v in only(written, sgm.CLIP).items()}
    name = f"{sgm.CLIP}visual_projection.weight"
    other[name] = other[name][:16].copy()
    with pytest.raises(WeightsError, match="CLIP tower: projection_dim is 16, in .* 32"):
        find(other | only(written, sgm.FIRST_STAGE), tmp_path, base)


def test_prefixes_are_found_in_full_files_only_once(written, tmp_path):
    save_file(written, tmp_path / "x.safetensors")
    assert components_there(open_weights(tmp_path / "x.safetensors")) == list(CONFIGS)
    assert sgm.canonical(written) == {name: name for name in written}
    assert load_file(tmp_path / "x.safetensors").keys() == written.keys()
