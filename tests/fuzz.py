"""Random damage to configs, JSON files, weight files, images and videos.

    python -m tests.fuzz --minutes 10 [--seed 0] [--kinds config,json] [--keep FOLDER]

Every input must be read, or be refused by a `UserError` of one printable line, within `PATIENCE` seconds. The command
prints the number of inputs and of both outcomes for each kind, and the traceback and the seed of every other outcome,
with which `--seed` begins again at that input; it ends with exit code 1 if there was any. It needs no torch.
"""

import argparse
import io
import json
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import save

from sfv_jax import config as configs
from sfv_jax.checkpoints.base import describe_run, read_run
from sfv_jax.checkpoints.importer import import_model
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.checkpoints.run import claim_workdir, read_config
from sfv_jax.config_check import check
from sfv_jax.config_rules import RULES
from sfv_jax.data import latents
from sfv_jax.data.images import read_image
from sfv_jax.data.video import duration, read_clip, write_video
from sfv_jax.errors import UserError
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.plain_config import flat
from sfv_jax.training.metrics import read_metrics
from sfv_jax.weights.components import COMPONENTS, from_json, to_json
from sfv_jax.weights.folders import read_json
from sfv_jax.weights.pipeline import SIGMAS, read_scheduler
from sfv_jax.weights.reader import open_weights
from tests.support import golden

PATIENCE = 30  # seconds for one input
METHODS = ("sfv", "teacher", "ladd", "ufogen", "animatelcm")
NASTY = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**63, -(2**63), 10**9, 10**30, 10**400),
    *(0.0, -0.0, 1e-320, 1e-30, 0.5, 1.5, 1e30, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "nan", "true", "svd", "../..", "/dev/zero", "a\nb", "\x1b[31m", "\ud800", "é" * 50, "x" * 5000),
    *([], [0], [1, 2], [-1], [[]], ["a"], [None], [float("nan")], [1] * 1000, {}, {"a": 1}, {"": {}}, [[[[[]]]]]),
    *("(a+)+$", "(", ".*", "[", "(a|a)*b", "(?P<x"),
)


def of_config(random: Random) -> Callable[[], object]:
    """Changes one to three fields of a config, or adds one that does not exist."""
    made = getattr(configs, random.choice(METHODS))()
    if random.random() < 0.5:
        made = configs.tiny(made)
    fields = flat(made.to_dict())
    names = [*fields, *RULES, "stepps", "sfv", "unet.", "a.b.c"]
    for _ in range(random.randint(1, 3)):
        fields[random.choice(names)] = random.choice(NASTY)
    return lambda: check(ConfigDict(nested(fields)))


def nested(fields: dict) -> dict:
    """Returns the nested dicts of `{"a.b": value}`; a section that is a value itself stays that value."""
    whole: dict = {}
    for name, value in fields.items():
        *sections, last = name.split(".")
        place = whole
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                break
            place = inner
        else:
            place[last] = value
    return whole


class Files:
    """Sound files of every kind, made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.json = {  # {file: its reader}
            self.write("run/network.json"): lambda path: read_run(path.parent),
            self.write("run/config.json"): lambda path: (
                read_config(path.parent),
                claim_workdir(path.parent, {"a": 1}),
            ),
            self.write("cache/manifest.json"): lambda path: latents.read_json(path, ("settings", "schema", "videos")),
            self.write("metrics.jsonl"): read_metrics,
            self.write("scheduler/scheduler_config.json"): lambda path: read_scheduler(path.parents[1]),
        }
        describe_run(folder / "run", UNetConfig(), PatchCodec(), None)
        (folder / "run/config.json").write_text(json.dumps(configs.sfv().to_dict()))
        manifest = {"settings": {"height": 32, "model": "a"}, "schema": 1, "videos": ["a.mp4", "b.mp4"]}
        (folder / "cache/manifest.json").write_text(json.dumps(manifest))
        lines = [{"step": step, "loss": 0.5, "nan": None} for step in range(5)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        scheduler = {"prediction_type": "v_prediction", "use_karras_sigmas": True} | dict(SIGMAS)
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
        for name in COMPONENTS:
            self.component(name)
        tensors = {f"layer.{n}.weight": np.ones((3, n + 1), np.float32) for n in range(5)}
        self.safetensors = save(tensors | {"mix": np.zeros(1, np.float16)}, metadata={"format": "pt"})
        self.images, self.videos = list(images()), [*videos(folder)]

    def write(self, name: str) -> Path:
        """Returns the path of a file in a folder that exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def component(self, name: str) -> None:
        """Adds the config of a network in diffusers' form."""
        path = self.write(f"{name}/config.json")
        path.write_text(json.dumps(to_json(name, golden.CONFIGS[name])))
        self.json[path] = lambda path: from_json(name, read_json(path), str(path))

    def model(self) -> None:
        """Adds `model.json` of a converted model."""
        from sfv_jax.weights.pipeline import save_pipeline

        save_pipeline(self.folder / "svd", golden.component_params, golden.CONFIGS, SIGMAS)
        import_model(self.folder / "svd", self.folder / "model")
        self.json[self.folder / "model/model.json"] = lambda path: read_model(path.parent)


def images():
    """Yields (suffix, bytes) of pictures in several formats."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), np.uint8)
    formats = (("png", "RGBA"), ("png", "P"), ("jpg", "RGB"), ("jpg", "CMYK"), ("webp", "RGBA"), ("gif", "P"))
    for suffix, mode in (*formats, ("bmp", "RGB"), ("tif", "RGB"), ("png", "I;16")):
        image = Image.fromarray(pixels).convert("RGB" if mode in ("P", "CMYK") else "RGBA")
        image = image.convert(mode) if mode != "I;16" else Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif} if suffix in ("jpg", "png", "webp") else {}
        image.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
        yield suffix, stream.getvalue()


def videos(folder: Path):
    """Yields (suffix, bytes) of short videos in several containers."""
    import av

    frames = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8).repeat(6, 1).repeat(8, 2)
    write_video(folder / "base.mp4", frames)
    yield "mp4", (folder / "base.mp4").read_bytes()
    for suffix, codec in (("avi", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx"), ("mpg", "mpeg2video")):
        path = folder / f"base.{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode())
        yield suffix, path.read_bytes()


def damage(random: Random, data: bytes) -> bytes:
    """Cuts, flips, repeats, overwrites or inserts bytes, one to four times; often near the beginning."""
    for _ in range(random.randint(1, 4)):
        end = len(data) if random.random() < 0.6 else min(len(data), 200)
        at, length = random.randrange(end + 1) if data else 0, random.choice((1, 1, 2, 4, 8, 64, 1000))
        change = random.randrange(6)
        if change == 0:
            data = data[:at]
        elif change == 1:
            data = data[:at] + bytes(b ^ (1 << random.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :]
        elif change == 2:
            data = data[:at] + data[at : at + length] * random.choice((2, 50)) + data[at + length :]
        elif change == 3:
            data = data[:at] + random.randbytes(length) + data[at + length :]
        elif change == 4:
            number = random.choice((b"\0" * length, b"\xff" * length, struct.pack("<Q", 2 ** random.randrange(64))))
            data = data[:at] + number + data[at + len(number) :]
        else:
            data = (
                data[:at] + random.choice((b"9" * 40, b'"', b"[" * 2000, b"{}", b"\x1b[2J", b"\n", b"NaN")) + data[at:]
            )
    return data


def of_json(random: Random, files: Files) -> Callable[[], object]:
    """Damages the text of a JSON file, or replaces, removes or adds a value anywhere in it."""
    path = random.choice(list(files.json))
    kept = path.read_bytes()
    text = damage(random, kept)
    if random.random() < 0.7 and path.suffix == ".json":
        content = json.loads(kept)
        place = content
        while (inner := [x for x in places(place) if isinstance(x, dict | list) and x]) and random.random() < 0.6:
            place = random.choice(inner)
        key = random.choice([*(place if isinstance(place, dict) else range(len(place)))])
        if random.random() < 0.2:
            del place[key]
        else:
            place[key if random.random() < 0.9 or isinstance(place, list) else "new"] = random.choice(NASTY)
        text = json.dumps(content, ensure_ascii=random.random() < 0.9).encode(errors="surrogatepass")

    def attempt() -> None:
        path.write_bytes(text)
        try:
            files.json[path](path)
        finally:
            path.write_bytes(kept)

    return attempt


def places(content) -> list:
    return list(content.values()) if isinstance(content, dict) else list(content)


def of_weights(random: Random, files: Files) -> Callable[[], object]:
    """Damages a safetensors file, half of the time in the values of its header."""
    data = files.safetensors
    if random.random() < 0.5:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        entry = random.choice([header, *(x for x in header.values() if isinstance(x, dict))])
        entry[random.choice(list(entry))] = random.choice(NASTY)
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + data[8 + size :]
    else:
        data = damage(random, data)
    path = files.folder / "damaged.safetensors"
    path.write_bytes(data)

    def attempt() -> None:
        for tensor in open_weights(path).entries.values():
            tensor.load()

    return attempt


def of_image(random: Random, files: Files) -> Callable[[], object]:
    suffix, data = random.choice(files.images)
    path = files.folder / f"damaged.{suffix}"
    path.write_bytes(damage(random, data))
    return lambda: read_image(path)


def of_video(random: Random, files: Files) -> Callable[[], object]:
    suffix, data = random.choice(files.videos)
    path = files.folder / f"damaged.{suffix}"
    path.write_bytes(damage(random, data))
    start = random.choice((0.0, 0.2, 3.0))
    return lambda: (duration(path), read_clip(path, 3, 7.0, start, 16, 24))


KINDS = {
    "config": lambda random, files: of_config(random),
    "json": of_json,
    "weights": of_weights,
    "image": of_image,
    "video": of_video,
}


def outcome(attempt: Callable[[], object]) -> tuple[str, str]:
    """Returns ("read" or "refused", "") or ("failed", what happened)."""

    def late(*_):
        raise TimeoutError(f"not finished after {PATIENCE} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        attempt()
    except UserError as error:
        lines = str(error).split("\n")
        plain = all(line.isprintable() for line in lines) and (
            len(lines) == 1 or lines[0].endswith(("mistakes:", "fields:"))
        )
        return ("refused", "") if plain else ("failed", f"the message is not a printable line: {str(error)[:300]!r}")
    except BaseException:  # noqa: BLE001  # a traceback is what is looked for, whatever it is of
        return "failed", traceback.format_exc()
    finally:
        signal.alarm(0)
    return "read", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all inputs")
    parser.add_argument("--inputs", type=int, default=10**9, help="most inputs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    arguments = parser.parse_args()
    kinds, counts, failures = arguments.kinds.split(","), Counter(), 0
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        if "json" in kinds:
            files.model()
        seed = arguments.seed
        while time.monotonic() < end and seed < arguments.seed + arguments.inputs:
            kind = kinds[seed % len(kinds)]
            result, story = outcome(KINDS[kind](Random(seed), files))
            counts[kind, result] += 1
            if story:
                failures += 1
                print(f"--seed={seed} --kinds={arguments.kinds} ({kind}):\n{story}", flush=True)
            seed += 1
    for kind in kinds:
        print(f"{kind:8}", *(f"{name} {counts[kind, name]:6}" for name in ("read", "refused", "failed")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{sum(counts.values())} inputs, {failures} failed; most memory {peak:.1f} GiB")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
