"""Broken and malicious weight files: one line names the fault before anything large is read."""

import gc
import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save

from sfv_jax.weights.folders import WeightsError, printable
from sfv_jax.weights.reader import open_weights

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def entry(start: int, stop: int, shape=(2,), dtype="F16") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def pack(header, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path, message: str, **kw) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        open_weights(path, **kw)
    assert "\n" not in str(caught.value) and path.parent.name in str(caught.value)


def test_tensors_are_read_as_the_library_reads_them(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(TENSORS, {"format": "pt"}))
    found = open_weights(path)
    assert set(found.names()) == {"a", "b"} and found.metadata == {"format": "pt"} and found.files == (path,)
    assert found.shape("a") == (2, 3) and found.dtype("b") == "F16"
    for name, value in TENSORS.items():
        assert found.read(name).dtype == value.dtype and np.array_equal(found.read(name), value)
    assert np.array_equal(found.renamed({"c": "a"}).read("c"), TENSORS["a"])


BROKEN = {
    "empty": (b"", "is empty"),
    "shorter than a length": (b"123", "is cut short"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "is cut short"),
    "absurd header": (struct.pack("<Q", 2**63) + b"{}", "its header would have 9,223,372,036,854,775,808 bytes"),
    "not JSON": (pack(b"{]"), "its header is no JSON object"),
    "not UTF-8": (pack(b"\xff\xfe"), "its header is no JSON object"),
    "a list": (pack(b"[1]"), "it is not a JSON object"),
    "deeply nested": (pack(b"[" * 100_000), "its header is no JSON object"),
    "a name twice": (pack(b'{"a":{},"a":{}}'), "it has 'a' twice"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "must hold strings"),
    "no offsets": (pack({"a": {"dtype": "F16", "shape": [2]}}), "'a' lacks dtype"),
    "unknown dtype": (pack({"a": entry(0, 4, dtype="X")}, bytes(4)), "'a' is of unknown dtype 'X'"),
    "negative offset": (pack({"a": entry(-4, 0)}, bytes(4)), r"'a' has shape \[2\] and offsets \[-4, 0\]"),
    "offsets reversed": (pack({"a": entry(4, 0)}, bytes(4)), "and offsets"),
    "negative shape": (pack({"a": entry(0, 4, (-1, -2))}, bytes(4)), r"has shape \[-1, -2\]"),
    "shape of lines": (pack({"a": entry(0, 4) | {"shape": "1\n2"}}, bytes(4)), r"has shape '1\\n2' and offsets"),
    "shape of booleans": (pack({"a": entry(0, 4, (2, True))}, bytes(4)), "has shape"),
    "shape beyond all memory": (pack({"a": entry(0, 4, (2**62, 2**62))}, bytes(4)), "takes .* bytes"),
    "shape against offsets": (pack({"a": entry(0, 6)}, bytes(6)), r"shape \[2\] of F16 takes 4 bytes"),
    "overlap": (pack({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "'a' and 'b' overlap"),
    "gap": (pack({"a": entry(0, 4), "b": entry(6, 10)}, bytes(10)), "2 bytes before tensor 'b' belong to none"),
    "beyond the end": (pack({"a": entry(0, 4)}, bytes(2)), "is cut short: tensor 'a' ends 2 bytes behind"),
    "surplus": (pack({"a": entry(0, 4)}, bytes(7)), "3 bytes behind its last tensor"),
    "a name twice among many": (
        pack(b"{" + b",".join(b'"%d":{}' % n for n in range(60_000)) + b',"7":{}}'),
        "it has '7' twice",
    ),
    "a million lists": (pack(b'{"a":[' + b"[]," * 2**20 + b"0]}"), "more than 1,048,576 parts"),
    "lists in lists": (pack(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), "nested too deeply|more than"),
    "a number too long": (pack(b'{"a":' + b"1" * 5000 + b"}"), "its header is no JSON object"),
    "NaN": (pack(b'{"a":NaN}'), "it contains NaN"),
    "too many axes": (pack({"a": entry(0, 4, [1] * 40 + [2])}, bytes(4)), "has 41 axes, more than 32"),
    "axes beyond all numbers": (pack({"a": entry(0, 0, (0, 2**62, 2**62))}, b""), "which no array has"),
    "escape codes as dtype": (pack({"a": entry(0, 4, dtype="\x1b[2J")}, bytes(4)), r"unknown dtype '\\x1b\[2J'"),
    "control characters": (pack({"\x1b[2J": entry(0, 4)}, bytes(4)), "cannot be printed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case, tmp_path):
    path = tmp_path / "x.safetensors"
    content, message = BROKEN[case]
    path.write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    refused(path, message)
    assert time.process_time() - began < 5 and tracemalloc.get_traced_memory()[1] < 20 * len(content) + 10**7
    tracemalloc.stop()


def test_the_time_of_many_names_grows_with_their_number(tmp_path):
    """Four times the names take about four times as long, not sixteen; none is there twice and ends the search."""

    def seconds(count: int) -> float:
        path = tmp_path / f"{count}.safetensors"
        path.write_bytes(pack({f"{n}": entry(0, 0, (0,)) for n in range(count)}))
        began = time.process_time()
        assert len(open_weights(path).names()) == count
        return time.process_time() - began

    gc.disable()  # a collection takes as long as all that the other tests left is large
    try:
        few, many = (min(seconds(count) for _ in range(2)) for count in (15_000, 60_000))
    finally:
        gc.enable()
    assert many < 10 * few


def test_damage_never_ends_in_another_error(tmp_path):
    """A thousand files with a few changed header bytes are either read or refused with a WeightsError."""
    rng, good, path = np.random.default_rng(0), save(TENSORS), tmp_path / "x.safetensors"
    refusals = 0
    for _ in range(1000):
        bad = bytearray(good)
        for at in rng.integers(0, len(good) - 32, rng.integers(1, 4)):
            bad[at] = rng.integers(256)
        path.write_bytes(bytes(bad))
        try:
            found = open_weights(path)
            assert all(found.read(name).shape == found.shape(name) for name in found.names())
        except WeightsError:
            refusals += 1
    assert refusals > 500


def test_what_is_not_a_file(tmp_path):
    refused(tmp_path / "nowhere.safetensors", "does not exist")
    refused(tmp_path, "is not a file: it is a folder")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    refused(loop, "cannot be read: Too many levels of symbolic links")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "gone.safetensors", "is a link that leads nowhere")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(TENSORS))
    found = open_weights(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="became shorter"):
        found.read("b")


INDICES = {
    "not JSON": ("{", "is cut off or not JSON"),
    "nested deeply": ('{"weight_map":' + "[" * 200_000, "cannot be used: it is nested too deeply"),
    "a list": ("[1]", "cannot be used: it is not a JSON object"),
    "a name twice": ('{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}', "it has 'a' twice"),
    "escape codes": ({"a": "one.safetensors", "b": "\x1b[31m.safetensors"}, r"outside its folder: '\\x1b\[31m"),
    "line ends": ({"a": "one.safetensors", "b": "x\nwrote out"}, r"outside its folder: 'x\\nwrote out"),
    "no map": ("{}", "has no weight_map"),
    "parent": ({"a": "../one.safetensors", "b": "two.safetensors"}, "looks for 'a' outside its folder"),
    "absolute": ({"a": "/etc/passwd", "b": "two.safetensors"}, "looks for 'a' outside its folder: '/etc/passwd'"),
    "number": ({"a": 1}, "has no weight_map"),
    "missing shard": ({"a": "one.safetensors", "b": "three.safetensors"}, "not there: three.safetensors"),
    "tensor elsewhere": ({"a": "two.safetensors", "b": "one.safetensors"}, "'a' in two.safetensors, but it is in one"),
    "tensor nowhere": (
        {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
        "'c' in .*, but it is not",
    ),
    "tensor not listed": ({"a": "one.safetensors", "c": "two.safetensors"}, "'c' in two.safetensors, but it is not"),
    "unlisted": ({"a": "one.safetensors", "b": "both.safetensors"}, "is in two files"),
}


@pytest.mark.parametrize("case", INDICES)
def test_indices(case, tmp_path):
    for name, keys in (("one", "a"), ("two", "b"), ("both", "ab")):
        (tmp_path / f"{name}.safetensors").write_bytes(save({k: TENSORS[k] for k in keys}))
    index = tmp_path / "x.safetensors.index.json"
    good = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    index.write_text(json.dumps(good))
    assert np.array_equal(open_weights(index).read("b"), TENSORS["b"])
    content, message = INDICES[case]
    index.write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))
    refused(index, message)


class Shout:
    """Object that runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')",)


def test_pickles_only_on_request(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.ckpt"
    state = {"a": torch.from_numpy(TENSORS["a"]), "b": torch.ones(4, dtype=torch.bfloat16)}
    torch.save({"state_dict": state, "epoch": 1}, path)
    refused(path, "can run code when it is loaded: pass --allow_pickle")
    found = open_weights(path, allow_pickle=True)
    assert np.array_equal(found.read("a"), TENSORS["a"]) and found.dtype("b") == "BF16"
    assert found.read("b").astype(np.float32).tolist() == [1.0] * 4
    torch.save({"a": Shout()}, path)
    refused(path, "holds more than tensors and was not loaded", allow_pickle=True)
    torch.save({"a": 1}, path)
    refused(path, "something else than tensors: 'a'", allow_pickle=True)
    unusable = {
        "is no plain array, but torch.sparse_coo": torch.eye(3).to_sparse(),
        "is no plain array, but nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "has no values here: it is on the device meta": torch.empty(4, device="meta"),
        r"has shape \(1000000, 1000000\), but fewer numbers are stored": torch.ones(1).expand(10**6, 10**6),
        "is of unknown dtype torch.complex64": torch.ones(2, dtype=torch.complex64),
    }
    for message, tensor in unusable.items():
        torch.save({"a": tensor}, path)
        refused(path, f"x.ckpt: 'a' {message}", allow_pickle=True)
    torch.save({"\x1b[2J": torch.ones(1)}, path)
    refused(path, r"'\\x1b\[2J' has a name that cannot be printed", allow_pickle=True)
    torch.save({"a": torch.ones(4)[::2], "b": torch._neg_view(torch.ones(2))}, path)  # views are arrays too
    found = open_weights(path, allow_pickle=True)
    assert found.read("a").tolist() == [1.0, 1.0] and found.read("b").tolist() == [-1.0, -1.0]
    whole = path.read_bytes()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end] or b"x")
        refused(path, "x.ckpt", allow_pickle=True)
    torch.jit.script(torch.nn.Identity()).save(str(path))
    refused(path, "is TorchScript, a program, and was not loaded", allow_pickle=True)
    path.write_bytes(b"PK\3\4 no zip")
    refused(path, "x.ckpt", allow_pickle=True)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    refused(path, "needs torch to be read", allow_pickle=True)


def test_messages_are_printable():
    """Text of files cannot move the cursor, forge lines or fill the screen."""
    assert str(WeightsError("a\x1b[2J\u202eb\n  c")) == "a\\x1b[2J\\u202eb\n  c"
    assert len(str(WeightsError("x" * 10**6))) < 2000
    assert printable("a\nb\udc80") == "a\\nb\\udc80"
