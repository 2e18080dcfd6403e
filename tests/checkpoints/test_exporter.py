"""Exports: files that stock libraries load, in shards of any size and any dtype, and cards with their origin."""

import ast
import dataclasses
import gc
import json
import re
import shutil
import weakref

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sfv_jax.checkpoints import exporter, importer
from sfv_jax.checkpoints.base import describe_run, load_generator, run_size
from sfv_jax.checkpoints.card import model_card
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.checkpoints.run import Checkpoints
from sfv_jax.models.unet import UNetConfig
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.weights import writer
from sfv_jax.weights.components import to_json
from sfv_jax.weights.diffusers import load_component, save_component
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.single_file import save_single_file
from tests.conftest import CONFIGS, error, noise

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def half_folder(pipeline_folder, tmp_path_factory):
    """Returns the model folder of `pipe`, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    importer.import_model(pipeline_folder, folder, options=importer.ReadOptions(dtype="bfloat16"))
    return folder


def test_bytes_are_those_of_the_library(tmp_path):
    tensors = {f"layer.{n}.weight": noise(n, 3, n + 1) for n in range(5)} | {"mix": np.zeros(1, np.float32)}
    tensors = {k: tensors[k].astype(np.float16) for k in sorted(tensors)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    shapes = {k: v.shape for k, v in tensors.items()}
    writer.write_safetensors(tmp_path / "ours.safetensors", shapes, tensors.items(), np.dtype(np.float16))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("tensors", [{}, {"b": np.zeros(2)}, {"a": np.zeros(3)}], ids=["missing", "other", "misshapen"])
def test_a_file_is_complete_or_absent(tmp_path, tensors):
    with pytest.raises(ValueError):
        writer.write_safetensors(tmp_path / "f.safetensors", {"a": (2,)}, tensors.items(), np.dtype(np.float32))
    assert not list(tmp_path.iterdir())


def test_sizes():
    assert [writer.parse_size(x) for x in ("10GB", "1.5 mb", "2GiB", 300)] == [10**10, 1_500_000, 2**31, 300]
    for wrong in ("", "GB", "-1GB", "ten", "0"):
        with pytest.raises(WeightsError, match="is not a size"):
            writer.parse_size(wrong)


@pytest.mark.parametrize(("component", "size"), [("unet", "500KB"), ("vae", "500KB"), ("image_encoder", "30KB")])
def test_shards_are_cut_and_named_as_diffusers_does(reference, pipe, params, tmp_path, component, size):
    torch = pytest.importorskip("torch")
    ours, theirs, original = tmp_path / "ours", tmp_path / "theirs", getattr(pipe, component)
    save_component(ours, component, params[component], CONFIGS[component], variant="fp16", max_shard_size=size)
    again = type(original).from_pretrained(ours, variant="fp16", torch_dtype=torch.float16)
    expected = {name: x.half() for name, x in original.state_dict().items()}
    assert all(torch.equal(x, expected[name]) for name, x in again.state_dict().items())

    again.save_pretrained(theirs, variant="fp16", max_shard_size=size)
    written, patterns = (
        {re.sub(r"\d{5}", "N", file.name) for file in folder.glob("*.safetensors*")} for folder in (ours, theirs)
    )
    assert written == patterns and len(written) == 2  # apart from numbers: diffusers orders the tensors differently
    index = json.loads(next(ours.glob("*.index.fp16.json")).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in ours.glob("*.safetensors")) and files[0].endswith(
        f"{len(files):05}.safetensors"
    )
    merged = {k: v for name in files for k, v in load_file(ours / name).items()}
    assert merged.keys() == index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in merged.values())
    largest = max(x.nbytes for x in merged.values())
    assert max((ours / name).stat().st_size for name in files) <= max(writer.parse_size(size), largest) + 30_000


@pytest.mark.slow
def test_one_step_of_diffusers_on_the_exported_folder(reference, model_folder, tmp_path):
    """With the exported scheduler, diffusers makes one step from sigma 700 to 0."""
    torch = pytest.importorskip("torch")
    from diffusers import StableVideoDiffusionPipeline
    from PIL import Image

    exporter.export_model(model_folder, tmp_path / "out")
    pipe = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(1)
    np.testing.assert_allclose(pipe.scheduler.sigmas, [700.0, 0.0])

    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    start, sampler = noise(1, 1, 4, 4, 6, 4), Sampler.load(model_folder)
    drawn = torch.randn((1, 3, 32, 48), generator=torch.Generator().manual_seed(0))
    condition = sampler.condition([image], (32, 48), None, (6, 127, 0.02), noise=np.moveaxis(drawn.numpy(), 1, -1))
    expected = pipe(
        Image.fromarray(image),
        height=32,
        width=48,
        num_frames=4,
        num_inference_steps=1,
        min_guidance_scale=1,
        max_guidance_scale=1,
        generator=torch.Generator().manual_seed(0),
        latents=reference.to_torch(start, torch.float32),
        output_type="latent",
    ).frames
    peak, rms = error(sampler.latents(condition, start), reference.to_numpy(expected))
    assert peak <= 1e-3 and rms <= 2e-4, (peak, rms)  # the gates of test_pipeline.py


@pytest.mark.slow
def test_bfloat16_models_leave_as_fp16_and_fp32(half_folder, params, tmp_path):
    expected = jax.tree.map(lambda x: np.asarray(x).astype(jax.numpy.bfloat16), params["unet"])
    for variant in (None, "fp16"):
        exporter.export_model(half_folder, tmp_path / str(variant), what="unet", variant=variant)
        found, config, _ = load_component(tmp_path / str(variant), "unet")
        dtype = np.float16 if variant else np.float32
        assert config == dataclasses.replace(CONFIGS["unet"], temporal_conv="auto")
        cast = jax.tree.map(lambda x: x.astype(dtype), expected)  # noqa: B023
        assert jax.tree.all(jax.tree.map(np.array_equal, found, cast))
    assert sorted(p.name for p in (tmp_path / "None").iterdir()) == ["README.md", "SHA256SUMS", "config.json", WEIGHTS]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pipeline", "comfyui"])
def test_one_network_is_held_at_a_time(model_folder, tmp_path, monkeypatch, what):
    held, load_model = [], exporter.load_model

    def load(folder, names):
        gc.collect()
        assert not [ref() for ref in held if ref() is not None]
        result = load_model(folder, names)
        held.append(weakref.ref(jax.tree.leaves(result[0])[0]))
        return result

    monkeypatch.setattr(exporter, "load_model", load)
    exporter.export_model(model_folder, tmp_path / "out.safetensors", what=what)
    assert len(held) == 3


@pytest.mark.parametrize("field", ["norm_groups", "resnet_eps", "mid_eps"])
def test_what_diffusers_would_compute_otherwise_is_refused(model_folder, tmp_path, field):
    copy = shutil.copytree(model_folder, tmp_path / "model")
    meta = json.loads((copy / "model.json").read_text())
    meta["configs"]["unet"][field] = 16 if field == "norm_groups" else 3e-5
    (copy / "model.json").write_text(json.dumps(meta))
    for what in exporter.FOREIGN:
        with pytest.raises(WeightsError, match=f"unet: {field} is .*, diffusers has .* built in"):
            exporter.export_model(copy, tmp_path / "out.safetensors", what=what)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    to_json("unet", UNetConfig.svd())


@pytest.fixture(scope="module")
def run(model_folder, params, tmp_path_factory):
    """Returns a workdir as after training: the moving average is `params`, the trained weights are twice `params`."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    describe_run(workdir, CONFIGS["unet"], None, model_folder, (64, 96))
    data = dict(source="latents", path="data/cats", split="train")
    config = dict(method="sfv", steps=50_000, init=str(model_folder), batch_size=32, data=data, sfv={"p_mean": -1.0})
    (workdir / "config.json").write_text(json.dumps(config))
    checkpoints = Checkpoints(workdir)
    ema = params["unet"]
    checkpoints.save(30, {"ema": ema, "generator": jax.tree.map(lambda x: 2 * np.asarray(x), ema)}, {"position": 0})
    checkpoints.close()
    return workdir


@pytest.mark.slow
def test_a_run_leaves_with_its_card(run, model_folder, params, tmp_path):
    exporter.export_model(run, tmp_path / "raw", what="unet", raw=True)
    exporter.export_model(run, tmp_path / "sfv-cats")
    for folder, factor in ((tmp_path / "raw", 2), (tmp_path / "sfv-cats" / "unet", 1)):
        expected = jax.tree.map(lambda x: factor * np.asarray(x), params["unet"])  # noqa: B023
        assert jax.tree.all(jax.tree.map(np.array_equal, load_component(folder, "unet")[0], expected))
    card = (tmp_path / "sfv-cats" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "pipeline_tag: image-to-video" in front and "library_name: diffusers" in front and "license: other" in front
    digest = read_model(model_folder).meta["source"]["sha256"][f"unet/{WEIGHTS}"]
    for fact in (
        "30 training steps of method `sfv`",
        "moving average",
        "30 of 50,000",
        "`data/cats`",
        f"| `unet/{WEIGHTS}` | `{digest}` |",
        "num_inference_steps=1, min_guidance_scale=1, max_guidance_scale=1",
        'sfv: `{"p_mean": -1.0}`',
        "check the origin above and the license",
    ):
        assert fact in card, fact
    assert "the trained weights themselves" in (tmp_path / "raw" / "README.md").read_text()


def test_runs_and_their_exports_know_the_size_of_their_videos(run, model_folder, tmp_path):
    exporter.export_model(run, tmp_path / "model", what="model")
    exporter.export_model(run, tmp_path / "one.safetensors", what="comfyui")
    for path in (run, tmp_path / "model"):
        base = load_generator(path)
        assert base.size == (64, 96) and not base.world
    nodes = json.loads((tmp_path / "one.json").read_text()).values()
    [settings] = [node["inputs"] for node in nodes if node["class_type"] == "SVD_img2vid_Conditioning"]
    assert (settings["height"], settings["width"]) == (64, 96)
    assert load_generator(model_folder).size is None


@pytest.mark.parametrize("size", [None, [64], [64, 96, 1], [64, "96"], [0, 96], [64, 1e9], {"h": 64}, True])
def test_an_older_or_odd_record_of_a_size_counts_as_none(run, tmp_path, size):
    content = json.loads((run / "network.json").read_text()) | {"size": size}
    (tmp_path / "network.json").write_text(json.dumps(content))
    assert run_size(tmp_path) is None


def test_cards_of_models_that_need_many_steps(model_folder):
    meta, unet = read_model(model_folder).meta, CONFIGS["unet"]
    base = model_card(unet, meta, what="pipeline", name="base", variant="fp16")
    assert "num_inference_steps=25" in base and "Not trained here" in base and 'variant="fp16"' in base
    assert "## Training" not in base
    run = dict(step=7, raw=False, config=dict(method="teacher", steps=7, data=dict(source="world", split="train")))
    teacher = model_card(unet, meta, what="comfyui", name="t.safetensors", variant=None, run=run)
    assert "# t\n" in teacher and "ComfyUI" in teacher and "20 to 25 steps" in teacher
    assert "method `teacher`" in teacher and "the procedural world" in teacher
    unknown = model_card(unet, {}, what="unet", name="u", variant=None)
    assert "Not recorded" in unknown and "UNetSpatioTemporalConditionModel.from_pretrained" in unknown


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("what", ["pipeline", "unet"])
def test_the_snippet_of_a_card_imports_what_it_uses(what, variant):
    card = model_card(CONFIGS["unet"], {}, what=what, name="out", variant=variant)
    tree = ast.parse(card.split("```python\n")[1].split("```")[0])
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = {
        alias.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    assert names <= bound | imported and imported <= names
    assert {"load_image", "export_to_video"} <= imported


def test_a_card_names_the_base_model_only_if_its_origin_does():
    run = dict(step=7, raw=False, config=dict(method="sfv", steps=7, data={}))
    meta = {"source": {"folder": "/models/stable-video-diffusion-img2vid-xt", "sha256": {}}}
    front = model_card(CONFIGS["unet"], meta, what="unet", name="u", variant=None, run=run).split("---\n")[1]
    assert "\nbase_model: stabilityai/stable-video-diffusion-img2vid-xt\nbase_model_relation: finetune\n" in front
    assert "\nlicense: other\nlicense_name: stable-video-diffusion-community\nlicense_link: " in front
    alone = model_card(CONFIGS["unet"], meta, what="unet", name="u", variant=None).split("---\n")[1]
    assert "base_model:" in alone and "relation" not in alone
    for folder in ("/models/mine", "stable-video-diffusion-img2vid-mine"):
        other = {"source": {"folder": folder, "sha256": {}}}
        assert "base_model" not in model_card(CONFIGS["unet"], other, what="unet", name="u", variant=None, run=run)


def test_a_run_whose_model_is_gone(tmp_path):
    (tmp_path / "run").mkdir()
    describe_run(tmp_path / "run", CONFIGS["unet"], None, tmp_path / "model")
    with pytest.raises(WeightsError, match="run was trained from .*model, which is gone"):
        exporter.export_model(tmp_path / "run", tmp_path / "out")


def test_values_too_large_for_fp16(params, tmp_path):
    huge = params | {
        "unet": params["unet"] | {"conv_out": jax.tree.map(lambda x: np.asarray(x) + 1e5, params["unet"]["conv_out"])}
    }
    with pytest.raises(WeightsError, match=r"out.2.* has values that float16 cannot hold: export without --fp16"):
        save_single_file(tmp_path / "out.safetensors", huge.__getitem__, CONFIGS, variant="fp16")
    assert not list(tmp_path.iterdir())


def test_names_in_a_card_are_shown_and_not_interpreted():
    unet = CONFIGS["unet"]
    meta = {"source": {"folder": "a`b\n# c", "sha256": {"a|b`<i>": "0|1"}}}
    run = {
        "step": 3,
        "raw": False,
        "config": {"method": "`sfv`", "steps": 3, "init": "x\n\n# y", "data": {"path": "`"}},
    }
    card = model_card(unet, meta, what="unet", name='a"b\n', variant=None, run=run)
    assert r"| `` a\|b`<i> `` | `0\|1` |" in card and r"`` a`b\n# c ``" in card
    assert r"started from: `x\n\n# y`" in card and "method: `` `sfv` ``" in card and "latent cache `` ` ``" in card
    assert r"""from_pretrained("a\"b\n")""" in card
