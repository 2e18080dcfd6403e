"""Flipped bits, cut and missing files of model folders and exports are found before anything is computed."""

import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sfv_jax.checkpoints import checksums, exporter, fingerprints, importer, run
from sfv_jax.checkpoints import model_folder as store
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig, CLIPVision
from sfv_jax.runtime.sharding import make_mesh, replicated_sharding
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.lazy import save_tree
from tests.conftest import noise

CONFIG, NAME = CLIPConfig.tiny(), "image_encoder"


def save(folder, dtype=np.float32):
    """Writes a model folder with a small CLIP tower alone; returns its parameters."""
    shapes = tree.abstract(CLIPVision, CONFIG)[1]
    params = jax.tree.map(lambda x: noise(x.size, *x.shape).astype(dtype), shapes)
    store.save_model(folder, {NAME: params}, {NAME: CONFIG})
    return params


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("small", [-1, 2**16])  # elements up to which the host reads arrays
def test_the_checksum_of_devices_is_that_of_the_host(dtype, small, monkeypatch):
    monkeypatch.setattr(checksums, "SMALL", small)
    values = {"a": {"b": noise(1, 7, 5).astype(dtype), "c": noise(2, 1).astype(dtype)}, "d": np.zeros((0, 3), dtype)}
    values["e"] = noise(3, 70, 1000).astype(dtype)
    expected = {path.replace(".", "/"): checksums.fingerprint(x) for path, x in tree.flatten(values).items()}
    assert checksums.examine(jax.tree.map(jnp.asarray, values)) == checksums.examine(values) == (expected, [])
    values["a"]["b"][1, 2], values["e"][3, 4] = np.nan, -np.inf
    found, bad = checksums.examine(jax.tree.map(jnp.asarray, values))
    assert bad == ["a/b", "e"] and {path for path, x in found.items() if x != expected[path]} == {"a/b", "e"}


@pytest.mark.parametrize(("rows", "cut"), [(8, False), (2**15, True)])
def test_small_arrays_on_several_devices_are_saved_whole(tmp_path, rows, cut):
    """No program cuts them for the devices, each of which would write a part; large ones are cut."""
    mesh = make_mesh(4, 2, 1)
    state = {"whole": jax.device_put(noise(1, rows, 16), replicated_sharding(mesh)), "step": jnp.int32(3)}
    state["split"] = jax.device_put(noise(2, 16, 8), NamedSharding(mesh, P("fsdp")))
    programs: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda *_, fun_name="", **__: programs.append(fun_name))
    for _ in range(2):  # the second restores
        with closing(run.Checkpoints(tmp_path)) as checkpoints:
            if found := checkpoints.restore(state):
                jax.tree.map(np.testing.assert_array_equal, found[1], state)
                assert found[1]["split"].sharding == state["split"].sharding
            else:
                checkpoints.save(3, state, {"position": 1})
                checkpoints.wait()
                assert any("slice" in name for name in programs) == cut, programs
    assert found[0] == 3 and found[2] == {"position": 1}


def test_long_arrays_are_summed_in_parts(monkeypatch):
    value = noise(4, 1001)
    whole = checksums.fingerprint(value)
    monkeypatch.setattr(checksums, "_PART", 64)
    assert checksums.fingerprint(value) == whole


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_arrays_are_verified_in_every_dtype(stored, tmp_path):
    """A number that is a little larger is noticed whether it is read as stored, cast, or cast and sharded."""
    params = save(tmp_path / "model", stored)
    sharding = NamedSharding(Mesh(jax.devices(), ("fsdp",)), P())
    rows = lambda x: P("fsdp") if x.ndim and x.shape[0] % 8 == 0 else P()  # noqa: E731
    by_rows = jax.tree.map(lambda x: NamedSharding(sharding.mesh, rows(x)), tree.abstract(CLIPVision, CONFIG)[1])
    options = [{}, {"shardings": {NAME: sharding}}, {"shardings": {NAME: by_rows}, "dtype": jnp.bfloat16}]
    options += [{"dtype": dtype} for dtype in (np.float32, np.float16, jnp.bfloat16)]
    for option in options:
        loaded = store.load_model(tmp_path / "model", (NAME,), **option)[0][NAME]
        assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y.astype(x.dtype)), loaded, params))
    other = jax.tree.map(np.array, params)
    other["vision_model"]["post_layernorm"]["bias"][3] *= 1.5
    shutil.rmtree(tmp_path / "model" / NAME)
    save_tree(tmp_path / "model" / NAME, other)
    for option in options:
        with pytest.raises(WeightsError, match=r"damaged: 1 of \d+ arrays .*vision_model.post_layernorm.bias"):
            store.load_model(tmp_path / "model", (NAME,), **option)
    (tmp_path / "model" / fingerprints.FILE).unlink()
    store.load_model(tmp_path / "model", (NAME,))  # as folders of earlier versions


@pytest.mark.slow
def test_no_flipped_bit_passes(tmp_path):
    """Each damaged folder is refused with one line, or holds what was saved."""
    params = save(tmp_path / "model")
    rng, refused = np.random.default_rng(0), 0
    data = max((tmp_path / "model" / NAME).rglob("*"), key=lambda path: path.stat().st_size)
    places = [data] * 6 + [path for path in sorted((tmp_path / "model" / NAME).rglob("*")) if path.is_file()]
    for n, place in enumerate(places):
        copy = shutil.copytree(tmp_path / "model", tmp_path / "copy")
        path = copy / place.relative_to(tmp_path / "model")
        content = bytearray(path.read_bytes())
        if n % 3 == 2 and n >= 6:
            content = content[: len(content) // 2]  # cut
        elif content:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(content))
        try:
            found = store.load_model(copy, (NAME,))[0][NAME]
            assert jax.tree.all(jax.tree.map(np.array_equal, found, params)), path
        except WeightsError as error:
            refused += 1
            assert "damaged" in str(error) and "\n" not in str(error), error
        shutil.rmtree(copy)
    assert refused >= 6


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"image_encoder": 3}', '{"image_encoder": {"a": 3}}', '{"image_encoder": {}}']
)
def test_damaged_fingerprints(content, tmp_path):
    save(tmp_path / "model")
    (tmp_path / "model" / fingerprints.FILE).write_text(content.replace("NAME", NAME))
    with pytest.raises(WeightsError, match=r"fingerprints.json|is damaged"):
        store.load_model(tmp_path / "model", (NAME,))


def test_a_tree_that_is_gone(tmp_path):
    save(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / NAME)
    with pytest.raises(WeightsError, match="image_encoder is damaged .*: convert the model again"):
        store.load_model(tmp_path / "model", (NAME,))


def test_copied_networks_keep_theirs(model_folder, pipeline_folder, tmp_path):
    importer.import_model(pipeline_folder / "unet", tmp_path / "out", base=model_folder)
    assert fingerprints.recorded(tmp_path / "out") == fingerprints.recorded(model_folder)
    assert set(fingerprints.recorded(model_folder)) == {"unet", "vae", "image_encoder"}


@pytest.mark.slow
@pytest.mark.parametrize("what", exporter.FOREIGN)
def test_exports_carry_checksums(what, model_folder, tmp_path):
    out = tmp_path / ("out.safetensors" if what == "comfyui" else "out")
    exporter.export_model(model_folder, out, what=what)
    base = model_folder if what == "unet" else None
    importer.import_model(out, tmp_path / "good", base=base)
    weights = out if what == "comfyui" else next(out.rglob("diffusion_pytorch_model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=f"{weights.name} is not what was written: its SHA-256 is another"):
        importer.import_model(out, tmp_path / "bad", base=base)
    assert not (tmp_path / "bad").exists()
    sums = tmp_path / "out.safetensors.sha256" if what == "comfyui" else out / "SHA256SUMS"
    assert all(len(line.split("  ")[0]) == 64 for line in sums.read_text().splitlines())
    sums.unlink()
    importer.import_model(out, tmp_path / "bad", base=base)


@pytest.mark.slow
def test_foreign_checksums_are_ignored_or_compared(pipeline_folder, tmp_path):
    """A list without our files, or one of other content, changes nothing."""
    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")
    (copy / "SHA256SUMS").write_bytes(b"\xff\n" + json.dumps({"a": 1}).encode() + b"\n0  /etc/passwd\n")
    importer.import_model(copy, tmp_path / "out")
