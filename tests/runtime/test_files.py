"""Files that are whole or absent, and messages on damaged ones."""

import os

import pytest

from sfv_jax.runtime.files import FileError, read_json, replacing, write_json


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: events.append(os.readlink(f"/proc/self/fd/{n}")) or fsync(n))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("rename") or replace(a, b))
    write_json(tmp_path / "a.json", {"x": 1})
    content, rename, folder = events
    assert content.endswith(".tmp") and rename == "rename" and folder == str(tmp_path)
    assert read_json(tmp_path / "a.json", "") == {"x": 1}


def test_a_failed_write_leaves_the_old_content_and_no_other_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(KeyError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("{")
        raise KeyError
    assert read_json(tmp_path / "a.json", "") == {"x": 1} and len(list(tmp_path.iterdir())) == 1


def test_processes_of_equal_numbers_write_different_files(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"\0\0\0\0", "is empty"),  # as after a power failure
        (b'{"a": 1, "b"', "is cut off or not JSON"),
        (b"[]", "is not a JSON object"),
        (b"3", "is not a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b"[" * 100_000, "is cut off or not JSON"),
        (b'{"a": 1}', "has no b, c"),
    ],
)
def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_json(path, "delete it", ("a", "b", "c"))
    text = str(caught.value)
    assert text.startswith(f"{path}: {message}") and text.endswith("; delete it") and "\n" not in text


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(FileError, match="is a directory; move it"):
        read_json(tmp_path, "move it")
