"""I3D against an independent implementation in torch, on random weights."""

import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sfv_jax.evaluation import fvd
from sfv_jax.models import i3d, tree
from sfv_jax.weights.folders import WeightsError

torch = pytest.importorskip("torch")
from tests.support import i3d_torch, random_i3d  # noqa: E402 (need torch)

F = torch.nn.functional


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_i3d.weights()


@pytest.mark.slow
def test_i3d(weights):
    """The networks agree in float64; in float32 they differ by the rounding of both."""
    eps = 1e-3
    frames = np.random.default_rng(1).uniform(-1, 1, (1, 14, 64, 64, 3)).astype(np.float32)
    graph, _ = tree.abstract(i3d.I3D, i3d.I3DConfig(batch_norm_eps=eps))
    expected = i3d_torch.network(weights, eps)(frames)

    def error(found) -> float:
        return np.abs(found - expected).max() / np.abs(expected).max()

    logits = lambda params, x: tree.build(graph, params)(x)  # noqa: E731
    found = jax.jit(logits)(tree.unflatten(weights), frames)
    assert found.shape == (1, 400) and error(found) <= 2e-6, error(found)  # 1.04e-6 measured
    with jax.enable_x64(True):
        double = {name: x.astype(np.float64) for name, x in weights.items()}
        exact = jax.jit(logits)(tree.unflatten(double), frames.astype(np.float64))
        assert exact.dtype == np.float64 and error(exact) <= 1e-12, error(exact)
    assert error(i3d_torch.network(weights, 1e-5)(frames)) > 1e-4


def test_products_are_fp32_on_every_device():
    graph, shapes = tree.abstract(i3d.I3D, i3d.I3DConfig())
    with jax.default_matmul_precision("bfloat16"):
        traced = jax.make_jaxpr(lambda p, x: tree.build(graph, p)(x))(shapes, jnp.zeros((1, 9, 64, 64, 3)))
    found = [eqn.params["precision"] for eqn in traced.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert len(found) == 58 and set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("t", [5, 6])
def test_the_forms_for_cpu_equal_the_plain_ones(kernel, stride, t, monkeypatch):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((2, t, 9, 10, 3)), rng.standard_normal((kernel,) * 3 + (3, 4))
    with jax.enable_x64(True):
        expected = i3d._convolve(x, weights, (stride,) * 3)
        np.testing.assert_allclose(i3d._convolve_frames(x, weights, (stride,) * 3), expected, atol=1e-11)
    for window, strides in ((kernel,) * 3, (stride,) * 3), ((1, 3, 3), (1, 2, 2)), ((2, 2, 2), (2, 2, 2)):
        found = i3d._max_pool(x, window, strides)
        with monkeypatch.context() as patch:
            patch.setattr(i3d, "platform", lambda: "gpu")
            assert np.array_equal(found, i3d._max_pool(x, window, strides))


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_the_form_of_a_convolution_follows_the_device(place, monkeypatch):
    monkeypatch.setattr(i3d, "platform", lambda: place)
    graph, shapes = tree.abstract(i3d.I3D, i3d.I3DConfig())
    traced = jax.make_jaxpr(lambda p, x: tree.build(graph, p)(x))(shapes, jnp.zeros((1, 9, 64, 64, 3)))
    ranks = {eqn.outvars[0].aval.ndim for eqn in traced.eqns if eqn.primitive.name == "conv_general_dilated"}
    assert ranks == ({4} if place == "cpu" else {5})


def test_parameters_and_clip_length():
    graph, shapes = tree.abstract(i3d.I3D, i3d.I3DConfig())
    statistics = sum(x.size for path, x in tree.flatten(shapes).items() if path.endswith((".mean", ".var")))
    assert tree.count(shapes) - statistics == 12_697_264
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        jax.eval_shape(lambda p, x: tree.build(graph, p)(x), shapes, jnp.zeros((1, 8, 64, 64, 3)))


@pytest.mark.parametrize("antialias", [False, True])
def test_resize_policy_is_that_of_torch(antialias):
    frames = np.random.default_rng(2).integers(0, 256, (1, 2, 96, 128, 3), dtype=np.uint8)
    x = torch.from_numpy(frames[0]).permute(0, 3, 1, 2).float()
    expected = F.interpolate(x, (56, 56), mode="bilinear", align_corners=False, antialias=antialias) * 2 / 255 - 1
    found = i3d.preprocess(frames, 56, antialias)[0]
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=2e-5)


# ---- files ----


@pytest.fixture(scope="module")
def state_dict(weights, tmp_path_factory):
    """The random weights under the names and in the layout of the PyTorch port."""
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    random_i3d.save(path, weights)
    return path


@pytest.mark.slow
def test_a_state_dict_and_its_conversion_are_the_network(weights, state_dict, tmp_path):
    command = [sys.executable, "-m", "sfv_jax.evaluation.fvd", f"--src={state_dict}", "--batch_norm_eps=1e-3"]
    subprocess.run([*command, f"--dst={tmp_path / 'i3d.safetensors'}"], check=True)
    with pytest.raises(WeightsError, match="exists already"):
        fvd.convert(state_dict, tmp_path / "i3d.safetensors")
    read = {p: fvd.read_i3d(p) for p in (state_dict, tmp_path / "i3d.safetensors")}
    for params, _, _ in read.values():
        flat = tree.flatten(params)
        assert flat.keys() == weights.keys()
        assert all(np.array_equal(flat[k], weights[k]) for k in weights)
    assert [config.batch_norm_eps for _, config, _ in read.values()] == [1e-5, 1e-3]
    _, about = fvd.load_i3d(tmp_path / "i3d.safetensors")
    assert about["source"]["sha256"] == fvd.sha256(state_dict) != about["sha256"]
    with pytest.raises(WeightsError, match="converted with batch_norm_eps 0.001, not 1e-05"):
        fvd.load_i3d(tmp_path / "i3d.safetensors", batch_norm_eps=1e-5)


@pytest.mark.parametrize(
    ("file", "names", "digest", "eps"),
    [
        ("rgb_imagenet.pt", ["a.bn.num_batches_tracked"], fvd.RGB_IMAGENET, 1e-3),
        ("old.pt", ["a.bn.running_mean"], "", 1e-3),
        ("i3d_pretrained_400.pt", ["a.bn.running_mean"], "", 1e-5),
        ("other.pt", ["a.bn.num_batches_tracked"], "", 1e-5),
    ],
)
def test_epsilons_are_those_of_the_programs_that_distribute_a_file(file, names, digest, eps, tmp_path, monkeypatch):
    monkeypatch.setattr(fvd, "sha256", lambda path: digest)
    assert fvd.default_eps(tmp_path / file, names) == eps


@pytest.mark.parametrize("entry", ["[", "[]", '{"batch_norm_eps": "x"}', '{"batch_norm_eps": -1}'])
def test_broken_headers_of_converted_files(entry, tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "i3d.safetensors", metadata={"i3d": entry})
    with pytest.raises(WeightsError, match=r"i3d.safetensors: (the entry i3d of its header is broken|batch_norm_eps)"):
        fvd.load_i3d(tmp_path / "i3d.safetensors")


@pytest.mark.parametrize(
    ("stored", "given", "eps"), [(1e-3, None, 1e-3), (None, 1e-4, 1e-4), (1e-4, 1e-4, 1e-4), (None, None, 1e-5)]
)
def test_the_epsilon_that_a_file_was_converted_with_counts(stored, given, eps, tmp_path, monkeypatch):
    about = {} if stored is None else {"batch_norm_eps": stored}
    path, used = tmp_path / "i3d_pretrained_400.safetensors", []
    save_file({"a": np.zeros(1, np.float32)}, path, metadata={"i3d": json.dumps(about)})
    monkeypatch.setattr(fvd, "_expected", lambda config: used.append(config.batch_norm_eps) or {})
    with pytest.raises(WeightsError, match="is not a state dict of InceptionI3d"):
        fvd.load_i3d(path, batch_norm_eps=given)
    assert used == [eps]
    if stored:
        with pytest.raises(WeightsError, match=f"converted with batch_norm_eps {stored}, not 0.5"):
            fvd.load_i3d(path, batch_norm_eps=0.5)


def test_a_damaged_archive(tmp_path):
    """It ends as an archive does, and its list of files is damaged."""
    (tmp_path / "i3d.pt").write_bytes(b"PK\5\6" + bytes(4) + struct.pack("<HHIIH", 1, 1, 46, 0, 0))
    with pytest.raises(WeightsError, match="i3d.pt is cut short or damaged: "):
        fvd.load_i3d(tmp_path / "i3d.pt")


def test_torchscript_is_run_as_it_is(tmp_path, monkeypatch):
    class Detector(torch.nn.Module):
        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
            assert rescale and resize and return_features
            return x.float().mean((2, 3, 4))

    torch.jit.script(Detector()).save(str(tmp_path / "i3d_torchscript.pt"))
    with pytest.raises(WeightsError, match="is TorchScript, a program that can .*: pass --allow_torchscript"):
        fvd.load_i3d(tmp_path / "i3d_torchscript.pt")
    features, about = fvd.load_i3d(tmp_path / "i3d_torchscript.pt", allow_torchscript=True)
    frames = np.random.default_rng(3).integers(0, 256, (2, 9, 4, 6, 3), dtype=np.uint8)
    np.testing.assert_allclose(features(frames), frames.mean((1, 2, 3)), rtol=1e-5)
    assert about["kind"] == "TorchScript" and len(about["sha256"]) == 64
    monkeypatch.setattr(fvd, "STYLEGAN_V", about["sha256"])  # the known file needs no flag
    assert fvd.load_i3d(tmp_path / "i3d_torchscript.pt")[1] == about
    content = (tmp_path / "i3d_torchscript.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="cut.pt"):
        fvd.load_i3d(tmp_path / "cut.pt", allow_torchscript=True)


def test_what_is_no_i3d(tmp_path, monkeypatch):
    monkeypatch.setattr(fvd.kinetics, "installed", lambda: None)
    torch.save({"Conv3d_1a_7x7.conv3d.weight": torch.zeros(64, 3, 7, 7, 5)}, tmp_path / "other.pt")
    for path, message in (
        (None, "name a file with --i3d.*i3d_torchscript.pt.*i3d_pretrained_400.pt"),
        (tmp_path / "absent.pt", "absent.pt does not exist. FVD needs I3D weights"),
        (tmp_path / "other.pt", r"(?s)not a state dict of InceptionI3d.*missing: Conv3d_1a_7x7.bn.bias.*and \d+ more"),
    ):
        with pytest.raises(WeightsError, match=message):
            fvd.load_i3d(path)
