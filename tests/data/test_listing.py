"""Listing of folders: one rule for all commands."""

import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from sfv_jax.data import preparation, ucf101
from sfv_jax.data.listing import ListingError, list_images, list_videos
from sfv_jax.data.settings import Settings
from sfv_jax.evaluation import clips
from sfv_jax.sampling import files


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(folder, found) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in found]


def test_suffixes_order_and_hidden_names(tmp_path):
    touch(
        tmp_path, "b.mp4", "B.mp4", "a/c.MOV", "a/notes.txt", ".hidden.mp4", "._b.mp4", ".git/d.mp4", "a.b/e.Mp4", "mp4"
    )
    (tmp_path / "folder.mp4").mkdir()
    assert names(tmp_path, list_videos(tmp_path)) == ["B.mp4", "a/c.MOV", "a.b/e.Mp4", "b.mp4"]
    hidden = tmp_path / ".cache"
    touch(hidden, "x.PNG", "y.heic")
    assert names(hidden, list_images(hidden)) == ["x.PNG", "y.heic"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "elsewhere/x.mp4", "in/a/y.mp4", "single.mp4")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/z.mp4").symlink_to(tmp_path / "single.mp4")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/a/self").symlink_to(".")
    (tmp_path / "in/lost.mp4").symlink_to("nowhere")
    (tmp_path / "in/round.mp4").symlink_to("round.mp4")
    assert names(tmp_path / "in", list_videos(tmp_path / "in")) == ["a/y.mp4", "link/x.mp4", "z.mp4"]


def test_only_regular_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        touch(tmp_path, "a.png")
        assert names(tmp_path, list_images(tmp_path)) == ["a.png"]


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    touch(tmp_path, "file", "a\nb/c.png")
    for place in ("absent", "file"):
        with pytest.raises(ListingError, match=f"{place}: not a directory"):
            list_videos(tmp_path / place)

    def deny(path):
        if path.name == "a\nb":
            raise PermissionError(13, "Permission denied")
        return iter([tmp_path / "a\nb"])

    monkeypatch.setattr("pathlib.Path.iterdir", deny)
    with pytest.raises(ListingError, match=r"a\\nb: cannot list the folder: Permission denied$"):
        list_images(tmp_path)


def test_all_commands_list_alike(tmp_path):
    """`prepare`, `evaluate`, UCF-101 and `sample` take the same files of a folder with one of each kind."""
    touch(tmp_path / "outside", "deep/v_c_g01_c01.AVI", "deep/d.PNG")
    folder = tmp_path / "folder"
    touch(
        folder, "v_a_g01_c01.avi", "._v_a_g01_c01.avi", ".hidden/v_b_g01_c01.avi", "e.png", "._e.png", ".hidden/f.png"
    )
    Image.new("RGB", (8, 8)).save(folder / "e.png")  # `sample` wants at least one that is an image
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "link/loop").symlink_to(folder)
    videos, pictures = ["link/deep/v_c_g01_c01.AVI", "v_a_g01_c01.avi"], ["e.png", "link/deep/d.PNG"]
    assert [clip.source for clip in preparation.plan(folder, Settings())["train"]] == videos
    assert sorted(names(folder, [clip.path for clip in clips.find_clips(folder)])) == videos
    assert sorted(names(folder, ucf101.videos(folder, "all")[0].values())) == videos
    assert names(folder, [job.image for job in files.jobs(folder, tmp_path / "out", "mp4")]) == pictures


def test_a_file_of_which_nothing_may_be_known(tmp_path, monkeypatch):
    """As one in a folder that may be listed but not entered: it is not left out silently."""
    touch(tmp_path, "a.png", "b.png")
    stat = Path.stat

    def deny(path, **options):
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", deny)
    with pytest.raises(ListingError, match=f"{tmp_path}: cannot list the folder: Permission denied$"):
        list_images(tmp_path)
