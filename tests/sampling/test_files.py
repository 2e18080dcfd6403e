"""Image files to video files: names, records, what is replaced and what is not, files that cannot be read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfv_jax.data.images import ImageError
from sfv_jax.data.video import read_comment
from sfv_jax.errors import UserError
from sfv_jax.runtime.files import sha256
from sfv_jax.sampling import files
from sfv_jax.sampling.files import SampleError


class Still:
    """A sampler whose videos repeat the image."""

    decoder = "full"

    def __init__(self):
        self.batches: list[list[int]] = []

    def size(self, image, height, width):
        return height or image[0] // 8 * 8, width or image[1] // 8 * 8

    def __call__(self, images, *, seed, times, height, width, **options):
        self.batches.append(seed)
        return np.stack([np.repeat(image[None, :height, :width], 2, axis=0) for image in images])


def picture(path: Path, color=(200, 50, 100), size=(32, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, "PNG")
    return path


def sample(image, out, kind="mp4", *, overwrite=False, batch_size=1, fps=7) -> Still:
    """What the command does after its flags are read, with another sampler."""
    todo, sampler = files.jobs(Path(image), Path(out), kind), Still()
    files.check_outputs(todo, fps, overwrite)
    options = dict(height=None, width=None, fit="crop", fps=fps)
    files.run(sampler, todo, files.Settings(options, 5, batch_size, False, {"checkpoint": "c"}))
    return sampler


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_video_and_its_record(tmp_path):
    image = picture(tmp_path / "in.png")
    sample(image, tmp_path / "new/out.mp4")
    assert names(tmp_path / "new") == ["out.json", "out.mp4"]
    made = json.loads((tmp_path / "new/out.json").read_text())
    assert made["video"] == "out.mp4" and made["video_sha256"] == sha256(tmp_path / "new/out.mp4")
    assert made["image"] == str(image) and made["image_sha256"] == sha256(image)
    inside = json.loads(read_comment(tmp_path / "new/out.mp4"))  # the settings travel with the video
    assert inside == {name: value for name, value in made.items() if name != "video_sha256"}
    assert made["fit"] == "crop"
    assert (made["seed"], made["num_frames"], made["height"], made["checkpoint"]) == (5, 2, 16, "c")


def test_a_folder_keeps_its_shape_and_names_are_distinct(tmp_path):
    for name in ("cat.png", "cat.jpg", "dog.png", "sub/cat.png", "sub/Owl.webp", "sub/owl.png"):
        picture(tmp_path / "in" / name)
    sampler = sample(tmp_path / "in", tmp_path / "out.v2", batch_size=4)
    videos = ["cat_jpg", "cat_png", "dog", "sub/Owl_webp", "sub/cat", "sub/owl_png"]
    assert names(tmp_path / "out.v2") == [f"{name}.{kind}" for name in videos for kind in ("json", "mp4")]
    assert sampler.batches == [[5, 6, 7, 8], [9, 10]]
    images = [json.loads((tmp_path / f"out.v2/{name}.json").read_text())["image"] for name in ("cat_jpg", "cat_png")]
    assert [Path(path).name for path in images] == ["cat.jpg", "cat.png"]
    picture(tmp_path / "in/cat_png.gif")
    with pytest.raises(SampleError, match="cat.png and cat_png.gif would have one video, cat_png: rename one"):
        files.jobs(tmp_path / "in", tmp_path / "out", "mp4")
    (tmp_path / "in/cat_png.gif").rename(tmp_path / "in/CAT_PNG.gif")
    with pytest.raises(SampleError, match="would have one video, cat_png: rename one"):  # where case does not count
        files.jobs(tmp_path / "in", tmp_path / "out", "mp4")


def test_images_that_cannot_be_read_are_listed_and_the_rest_sampled(tmp_path, capsys):
    for name in ("a.png", "c.png", "e.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:60])
    (tmp_path / "in/d\n.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "in/pipe.png")
    with pytest.raises(
        SampleError, match=r"^2 of 5 images could not be read:\n  .*b.png: .*\n  .*d\\n.jpg: .*$"
    ) as caught:
        sample(tmp_path / "in", tmp_path / "out", batch_size=2)
    assert len(str(caught.value).splitlines()) == 3
    assert names(tmp_path / "out") == [f"{name}.{kind}" for name in "ace" for kind in ("json", "mp4")]
    assert json.loads((tmp_path / "out/e.json").read_text())["seed"] == 9  # the number of the image counts
    assert capsys.readouterr().err.count("skipped: ") == 2
    with pytest.raises(ImageError, match="b.png: "):
        files.jobs(tmp_path / "in/b.png", tmp_path / "out.mp4", "mp4")


def test_batches_have_one_size(tmp_path):
    for n, size in enumerate([(32, 16), (32, 16), (16, 16), (32, 16), (32, 16), (35, 17)]):
        picture(tmp_path / f"in/{n}.png", size=size)
    assert sample(tmp_path / "in", tmp_path / "out", batch_size=2).batches == [[5, 6], [7], [8, 9], [10]]


def test_the_same_command_replaces_its_own_results(tmp_path):
    image = picture(tmp_path / "in.png")
    sample(image, tmp_path / "out.mp4")
    before = (tmp_path / "out.mp4").read_bytes()
    sample(picture(tmp_path / "in.png", (0, 0, 255)), tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() != before
    (tmp_path / "out.mp4").unlink()  # the record remains
    sample(image, tmp_path / "out.mp4")
    made = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").write_text(json.dumps({k: v for k, v in made.items() if k != "video_sha256"}))
    sample(image, tmp_path / "out.mp4")  # as after a kill between the writes


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("out.mp4", b"mine", "out.mp4 has no record out.json"),
        ("out.json", b'{"caption": "a cat"}', "out.json is no record of this command"),
        ("out.json", b"no json", "out.json is no record of this command"),
        ("out.json", b"[1]", "out.json is no record of this command"),
        ("out.json", b"[" * 99_999, "out.json is no record of this command"),
        ("out.json", b'{"video": 3, "image_sha256": ""}', "out.json is no record of this command"),
        ("out.json", b'{"video": "../b.mp4", "image_sha256": ""}', "out.json is no record of this command"),
        ("out.json", b'{"video": "", "image_sha256": ""}', "out.json is no record of this command"),
    ],
)
def test_foreign_files_are_not_replaced(tmp_path, name, content, message):
    image = picture(tmp_path / "in/in.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=f"{message}: nothing was written; .* --overwrite$"):
        sample(image, tmp_path / "out.mp4")
    assert names(tmp_path) == ["in/in.png", name] and (tmp_path / name).read_bytes() == content
    sample(image, tmp_path / "out.mp4", overwrite=True)
    assert (tmp_path / name).read_bytes() != content


def test_a_changed_video_and_the_record_of_another_are_not_replaced(tmp_path):
    image = picture(tmp_path / "in/in.png")
    sample(image, tmp_path / "out.mp4")
    with pytest.raises(SampleError, match="out.json, where its record goes, is that of out.mp4"):
        sample(image, tmp_path / "out.gif")
    (tmp_path / "out.mp4").write_bytes(b"cut by hand")
    with pytest.raises(SampleError, match="out.mp4 was changed since it was made"):
        sample(image, tmp_path / "out.mp4")
    (tmp_path / "out.mp4").unlink()
    (tmp_path / "out.gif").write_bytes(b"by hand")
    with pytest.raises(SampleError, match="out.json, where its record goes, is that of out.mp4"):
        sample(image, tmp_path / "out.gif")
    (tmp_path / "out.gif").unlink()
    sample(image, tmp_path / "out.gif")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["a.mp4", "a.json"])
def test_a_folder_is_never_replaced(tmp_path, name, overwrite):
    picture(tmp_path / "in/a.png")
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(SampleError, match=f"out/{name} is a folder: nothing was written"):
        sample(tmp_path / "in", tmp_path / "out", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_never_replaced(tmp_path, overwrite):
    image = picture(tmp_path / "in.png")
    (tmp_path / "link.png").hardlink_to(image)
    before = image.read_bytes()
    for out in ("in.png", "./in.png", "link.png"):
        with pytest.raises(SampleError, match="in.png|link.png is an image to be read"):
            sample(image, tmp_path / out, overwrite=overwrite)
    for out in (tmp_path, tmp_path / "below"):
        with pytest.raises(SampleError, match="the next run would take each .png for an image"):
            sample(tmp_path, out, "png", overwrite=overwrite)
    assert image.read_bytes() == before and names(tmp_path) == ["in.png", "link.png"]
    sample(tmp_path, tmp_path, "mp4")
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "image, out, message",
    [
        ("in/a.png", "x.mov", "cannot write .mov; use .mp4, .gif, .webp, .png"),
        ("in/a.png", "x", "cannot write a file without suffix"),
        ("in/a.png", "in", "is a folder: for one image name the video, such as .*in/a.mp4"),
        ("in/a.png", "in/a.png/x.mp4", "cannot be written: .*a.png is no folder"),
        ("in/a.png", "folder.mp4", "is a folder"),
        ("in", "in/a.png", "is a folder, so --out must be a folder too"),
        ("in", "x.mp4", "is a folder, so --out must be a folder too"),
        ("empty", "x", "holds no image"),
        ("absent.png", "x.mp4", "no such file"),
    ],
)
def test_impossible_outputs(tmp_path, image, out, message):
    picture(tmp_path / "in/a.png")
    for name in ("empty", "folder.mp4"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=message):
        sample(tmp_path / image, tmp_path / out)


def test_rates_of_a_gif(tmp_path):
    image = picture(tmp_path / "in.png")
    with pytest.raises(SampleError, match="--fps 60: a GIF shows at most 50 frames per second"):
        sample(image, tmp_path / "out.gif", fps=60)
    sample(image, tmp_path / "out.gif", fps=50)
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.info["duration"] == 40  # two equal pictures are stored as one
    sample(image, tmp_path / "fast.webp", fps=60)


def test_any_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stems = [os.fsdecode(name) for name in (b"bad\xff", b"a:b", b"line\nend", b"\x1b[31mred", b"pipe:1")]
    for stem in stems:
        picture(Path(f"in/{stem}.png"))
    sample("in", "out")
    sample("in/a:b.png", "a:b.mp4")  # FFmpeg would take the name for a protocol
    assert len(list(Path("out").glob("*.mp4"))) == 5 and Path("a:b.mp4").is_file()
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).splitlines()) and said.out.count("frames of") == 6


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    image = picture(tmp_path / "in.png")

    def fail(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_video", fail)
    with pytest.raises(SampleError, match="out.mp4: cannot write: No space left on device"):
        sample(image, tmp_path / "out.mp4")
    assert "out.mp4" not in names(tmp_path)
