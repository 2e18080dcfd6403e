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
from tests.support import random_i3d  # noqa: E402 (needs torch)

F = torch.nn.functional


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_i3d.weights()


def reference(weights: dict, frames: np.ndarray, eps: float) -> np.ndarray:
    """Returns the logits of `frames [b, t, h, w, 3]`, float64."""
    get = {k: torch.from_numpy(v).double() for k, v in weights.items()}

    def pad_same(x, window, stride):
        sides = []
        for n, k, s in zip(reversed(x.shape[2:]), reversed(window), reversed(stride), strict=True):
            total = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
            sides += [total // 2, total - total // 2]
        return F.pad(x, sides)

    def conv(x, name, stride=1):
        kernel = get[f"{name}.kernel"].permute(4, 3, 0, 1, 2)
        return F.conv3d(pad_same(x, kernel.shape[2:], (stride,) * 3), kernel, get.get(f"{name}.bias"), stride)

    def unit(x, name, stride=1):
        x = conv(x, f"{name}.conv3d", stride)
        mean, var, scale, bias = (get[f"{name}.bn.{k}"] for k in ("mean", "var", "scale", "bias"))
        return F.relu(F.batch_norm(x, mean, var, scale, bias, eps=eps))

    def pool(x, window, stride):
        return F.max_pool3d(pad_same(x, window, stride), window, stride)  # zeros suffice: inputs are not negative

    def mixed(x, name):
        low = unit(x, f"{name}.b0")
        one = unit(unit(x, f"{name}.b1a"), f"{name}.b1b")
        two = unit(unit(x, f"{name}.b2a"), f"{name}.b2b")
        return torch.cat([low, one, two, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], 1)

    x = unit(torch.from_numpy(frames).double().permute(0, 4, 1, 2, 3), "Conv3d_1a_7x7", 2)
    x = unit(unit(pool(x, (1, 3, 3), (1, 2, 2)), "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for name in ("Mixed_3b", "Mixed_3c"):
        x = mixed(x, name)
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"):
        x = mixed(x, name)
    x = pool(x, (2, 2, 2), (2, 2, 2))
    for name in ("Mixed_5b", "Mixed_5c"):
        x = mixed(x, name)
    x = conv(F.avg_pool3d(x, (2, *x.shape[3:]), stride=1), "logits.conv3d")
    return x.mean((2, 3, 4)).numpy()


@pytest.mark.slow
def test_i3d(weights):
    """The networks agree in float64; in float32 they differ by the rounding of both."""
    eps = 1e-3
    frames = np.random.default_rng(1).uniform(-1, 1, (1, 14, 64, 64, 3)).astype(np.float32)
    graph, _ = tree.abstract(i3d.I3D, i3d.I3DConfig(batch_norm_eps=eps))
    expected = reference(weights, frames, eps)

    def error(found) -> float:
        return np.abs(found - expected).max() / np.abs(expected).max()

    logits = lambda params, x: tree.build(graph, params)(x)  # noqa: E731
    found = jax.jit(logits)(tree.unflatten(weights), frames)
    assert found.shape == (1, 400) and error(found) <= 2e-6, error(found)  # 1.04e-6 measured
    with jax.enable_x64(True):
        double = {name: x.astype(np.float64) for name, x in weights.items()}
        exact = jax.jit(logits)(tree.unflatten(double), frames.astype(np.float64))
        assert exact.dtype == np.float64 and error(exact) <= 1e-12, error(exact)
    assert error(reference(weights, frames, 1e-5)) > 1e-4


def test_products_are_fp32_on_every_device():
    graph, shapes = tree.abstract(i3d.I3D, i3d.I3DConfig())
    with jax.default_matmul_precision("bfloat16"):
        traced = jax.make_jaxpr(lambda p, x: tree.build(graph, p)(x))(shapes, jnp.zeros((1, 9, 64, 64, 3)))
    found = [eqn.params["precision"] for eqn in traced.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert len(found) == 58 and set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


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
