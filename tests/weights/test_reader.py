"""Every usual layout of the weights becomes the same model folder; other files are refused and leave nothing behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sfv_jax.checkpoints.importer import ReadOptions, import_model
from sfv_jax.checkpoints.model_folder import encoders_identity, load_model, read_model
from sfv_jax.models import tree
from sfv_jax.runtime.files import sha256
from sfv_jax.weights import hub, lazy
from sfv_jax.weights.components import COMPONENTS
from sfv_jax.weights.diffusers import find_weights, open_component
from sfv_jax.weights.folders import WeightsError, new_folder
from sfv_jax.weights.lazy import read_all
from sfv_jax.weights.pipeline import SIGMAS, save_pipeline
from tests.conftest import CONFIGS

STEM = "diffusion_pytorch_model"


def random_params(component: str) -> tree.Params:
    rng = np.random.default_rng(0)
    _, shapes = tree.abstract(COMPONENTS[component].module, CONFIGS[component])
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder made without torch; tests must not change it."""
    path = tmp_path_factory.mktemp("sources") / "svd-random"
    save_pipeline(path, random_params, CONFIGS, SIGMAS)
    return path


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("sources") / "model"
    import_model(folder, path)
    return path


def split(unet, names: list[str], index: str | None):
    """Splits the UNet's single file into three files of these names."""
    tensors = load_file(unet / f"{STEM}.safetensors")
    (unet / f"{STEM}.safetensors").unlink()
    parts = {name: sorted(tensors)[n::3] for n, name in enumerate(names)}
    for name, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, unet / name)
    if index:
        where = {k: name for name, keys in parts.items() for k in keys}
        (unet / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


BEFORE, AFTER = (
    [f"{STEM}{a}-0000{n}-of-00003{b}.safetensors" for n in (1, 2, 3)] for a, b in ((".fp16", ""), ("", ".fp16"))
)
PLAIN = [f"{STEM}-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
LAYOUTS = {
    "sharded": (PLAIN, f"{STEM}.safetensors.index.json"),
    "variant before the number": (BEFORE, f"{STEM}.safetensors.index.fp16.json"),
    "variant after the number": (AFTER, f"{STEM}.safetensors.index.fp16.json"),
    "index named like its files": (BEFORE, f"{STEM}.fp16.safetensors.index.json"),
    "plain index of a variant": (AFTER, f"{STEM}.safetensors.index.json"),
    "no index": (PLAIN, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards(folder, layout, tmp_path):
    unet = shutil.copytree(folder / "unet", tmp_path / "unet")
    split(unet, *LAYOUTS[layout])
    tensors, _ = open_component(unet, "unet", variant=None if layout in ("sharded", "no index") else "fp16")
    expected = load_file(folder / "unet" / f"{STEM}.safetensors")
    assert set(tensors.names()) == expected.keys()
    assert all(np.array_equal(tensors.read(name), value) for name, value in expected.items())
    if layout == "no index":
        (unet / PLAIN[1]).unlink()
        with pytest.raises(WeightsError, match="does not hold every shard once"):
            open_component(unet, "unet")


def test_names_of_weight_files():
    """Names of transformers are found too; plain precision comes first, safetensors before pickles."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert find_weights(["config.json", *shards, index], "model") == [index, *shards]
    assert find_weights([*shards, index, "model.fp16.safetensors"], "model", "fp16") == ["model.fp16.safetensors"]
    assert find_weights(["pytorch_model.bin", "model.safetensors"], "model") == ["model.safetensors"]
    assert find_weights(["pytorch_model.bin"], "model") == ["pytorch_model.bin"]
    assert find_weights(["model.safetensors"], "model", "fp16") == []


def test_whole_folder(folder, model):
    loaded, _, meta = load_model(model)
    for name in CONFIGS:
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded[name], random_params(name)))
    files = {f"{path.parent.name}/{path.name}": path for name in CONFIGS for path in (folder / name).iterdir()}
    assert meta["source"]["sha256"] == {name: sha256(path) for name, path in files.items()}


@pytest.mark.slow
def test_lone_unet(folder, model, tmp_path):
    """AnimateLCM's form: one file with diffusers' names; all else comes from the base."""
    tensors = {k: 2 * v for k, v in load_file(folder / "unet" / f"{STEM}.safetensors").items()}
    path = tmp_path / "AnimateLCM-SVD-xt.safetensors"
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="is a UNet alone: pass --base MODEL_FOLDER"):
        import_model(path, tmp_path / "out")
    import_model(path, tmp_path / "out", base=model)
    loaded, configs, meta = load_model(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, 2 * y), loaded["unet"], random_params("unet")))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded["vae"], random_params("vae")))
    assert configs == read_model(model).configs and meta["scheduler"]["sigma_max"] == 700.0
    assert meta["source"]["base"] == "model" and meta["source"]["sha256"][f"unet/{path.name}"] == sha256(path)
    assert encoders_identity(meta) == encoders_identity(read_model(model).meta) != ""
    with pytest.raises(WeightsError, match="--base is for a UNet alone"):
        import_model(folder, tmp_path / "other", base=model)
    del tensors["conv_in.bias"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"does not fit the UNet of .*\n  missing: conv_in.bias"):
        import_model(path, tmp_path / "other", base=model)


def test_lone_unet_folder(folder, model, tmp_path):
    with pytest.raises(WeightsError, match="unet is a UNet alone: pass --base"):
        import_model(folder / "unet", tmp_path / "out")
    with pytest.raises(WeightsError, match="vae is a VAE alone: pass --base MODEL_FOLDER"):
        import_model(folder / "vae", tmp_path / "out")
    unet = shutil.copytree(folder / "unet", tmp_path / "unet")
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"num_frames": 77}))
    import_model(unet, tmp_path / "out", base=model)
    assert read_model(tmp_path / "out").configs["unet"].num_frames == 77


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["vision_model.embeddings.class_embedding"], "a CLIP tower"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE"),
        (["conv_in.weight", "time_embedding.linear_1.bias"], "a UNet without time layers"),
        (["unet.down_blocks.0.to_q.lora_A.weight"], "LoRA weights"),
        (["down_blocks.0.motion_modules.0.norm.weight"], "a motion module of AnimateDiff"),
        (["embedding.weight"], "unknown tensors, such as embedding.weight"),
    ],
)
def test_other_files_are_named(names, kind, tmp_path):
    save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=f"holds {kind}"):
        import_model(tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_values_that_are_no_numbers(folder, tmp_path):
    """NaN and infinity are found while the network is written: the message names the tensor, the disk stays empty."""
    bad = shutil.copytree(folder, tmp_path / "bad")
    path = bad / "unet" / f"{STEM}.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][1], tensors["conv_in.weight"][0, 0, 0, 0] = np.nan, np.inf
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"NaN or infinite values, the first in (conv_\w+\.\w+, )conv_"):
        import_model(bad, tmp_path / "out")
    tensors["conv_out.bias"][1], tensors["conv_in.weight"][0, 0, 0, 0] = 1e6, 0
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="conv_out.bias has values that float16 cannot hold"):
        import_model(bad, tmp_path / "out", options=ReadOptions(dtype="float16"))
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_source_is_never_replaced(folder, model, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "parent" / "svd")
    for dst in (copy, tmp_path / "parent"):
        with pytest.raises(WeightsError, match="is or contains .*, which is to be read: choose another --dst"):
            import_model(copy, dst, overwrite=True)
    base = shutil.copytree(model, tmp_path / "model")
    with pytest.raises(WeightsError, match="is or contains .*, which is to be read: choose another --dst"):
        import_model(copy / "unet", base, base=base, overwrite=True)
    with pytest.raises(WeightsError, match="is a model folder already"):
        import_model(model, tmp_path / "out")


def test_parameters_are_read_some_at_a_time(tmp_path, monkeypatch):
    """Memory holds no more than the limit while a tree is written."""
    monkeypatch.setattr(lazy, "IN_FLIGHT", 4000)
    alive, most = [], 0

    class Tracked(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive.remove(id(self))

    def read(n: int) -> np.ndarray:
        nonlocal most
        value = np.ndarray.__new__(Tracked, 250, np.float32)
        value[:] = n
        alive.append(id(value))
        most = max(most, len(alive))
        return value

    params = {str(n): lazy.Lazy((250,), np.dtype(np.float32), lambda n=n: read(n)) for n in range(32)}
    lazy.save_tree(tmp_path / "tree", params)
    assert 1 <= most <= 8, "four are being written, four may wait for the collector"
    assert read_all(params)["7"][0] == 7


def test_remains_of_killed_processes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    for suffix, process in (("partial", dead.pid), ("partial", os.getppid()), ("old", dead.pid)):
        left = tmp_path / f".out.{suffix}-{host}-{process}"
        left.mkdir()
        (left / suffix).touch()
    with pytest.raises(WeightsError, match="out exists already"), new_folder(tmp_path / "out"):
        pass  # a replacement was interrupted: the old folder is restored
    assert (tmp_path / "out" / "old").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", f".out.partial-{host}-{os.getppid()}"}


SLOW = """
import signal, sys, time
from sfv_jax import convert
from sfv_jax.weights import diffusers
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
read = diffusers.read_finite
diffusers.read_finite = lambda *a: (print("reading", flush=True), time.sleep(0.1), read(*a))[-1]
sys.argv = ["convert", "--src", sys.argv[1], "--dst", sys.argv[2]]
convert.commands.run(convert.main, convert.define_flags)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_stopped_while_reading(folder, tmp_path, number):
    command = [sys.executable, "-c", SLOW, str(folder), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"reading {folder}\n"
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    code, said = {signal.SIGTERM: (1, "convert: stopped"), signal.SIGINT: (130, "convert: interrupted")}[number]
    assert process.returncode == code and said in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


class FakeHub:
    """Stand-in for huggingface_hub: a folder on disk, or an error."""

    def __init__(self, folder, error=None):
        self.folder, self.error, self.asked = folder, error, []

    def HfApi(self):
        return self

    def list_repo_files(self, repo):
        if self.error:
            raise self.error
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def snapshot_download(self, repo, allow_patterns):
        self.asked += allow_patterns
        return str(self.folder)

    def hf_hub_download(self, repo, file):
        self.asked.append(file)
        return str(self.folder / file)


@pytest.mark.slow
def test_hub(folder, tmp_path, monkeypatch):
    import huggingface_hub

    there = shutil.copytree(folder, tmp_path / "snapshot")
    (there / "svd.safetensors").touch()
    (there / "unet" / f"{STEM}.fp16.safetensors").touch()
    fake = FakeHub(there)
    for name in ("HfApi", "snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    import_model("hub:someone/svd", tmp_path / "out")
    assert read_model(tmp_path / "out").meta["source"]["folder"] == "hub:someone/svd"
    weights = {f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors", "image_encoder/model.safetensors"}
    assert {name for name in fake.asked if name.endswith(".safetensors")} == weights
    assert hub.download("hub:someone/svd/svd.safetensors") == there / "svd.safetensors"
    with pytest.raises(WeightsError, match="has no vae/diffusion_pytorch_model.fp16.safetensors"):
        hub.download("hub:someone/svd", "fp16")
    with pytest.raises(WeightsError, match="write hub:ORG/NAME"):
        hub.download("hub:svd")


def test_hub_errors(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def error(kind):
        return kind.__new__(kind)  # their constructors require a server's response

    cases = [
        (
            error(errors.GatedRepoError),
            "is gated: accept the license on https://huggingface.co/a/b, then run: hf auth login",
        ),
        (error(errors.RepositoryNotFoundError), "is not on the hub, or private and you are not logged in"),
        (errors.OfflineModeIsEnabled("offline mode"), r"cannot be downloaded \(offline mode\)"),
        (OSError("no route to host"), r"cannot be downloaded \(no route to host\)"),
    ]
    for raised, message in cases:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda raised=raised: FakeHub(None, raised))
        with pytest.raises(WeightsError, match=re.escape(message) if "https" in message else message):
            hub.download("hub:a/b")
