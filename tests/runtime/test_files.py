"""Files that are whole or absent, and messages on damaged ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfv_jax.runtime import files
from sfv_jax.runtime.files import MAX_LIST, FileError, read_json, replacing, write_json

ROOT = Path(__file__).parents[2]


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
        (None, "does not exist"),
        (b"", "cannot be used: it is empty"),
        (b"\0\0\0\0", "cannot be used: it is empty"),  # as after a power failure
        (b'{"a": 1, "b"', "cannot be used: it is cut off or not JSON"),
        (b"[]", "cannot be used: it is not a JSON object"),
        (b"3", "cannot be used: it is not a JSON object"),
        (b'{"a": "\xff"}', "cannot be used: it is not UTF-8 text"),
        (b"[" * 100_000, "cannot be used: it is nested too deeply"),
        (b'{"a":[' + b"[]," * 2**20 + b"0]}", "cannot be used: it has more than 1,048,576 parts"),
        (b'{"a":"' + b"x" * 2**24 + b'"}', "cannot be used: it is larger than 16,777,216 bytes"),
        (b'{"a": NaN}', "cannot be used: it contains NaN"),
        (b'{"a": 1, "a": 2}', "cannot be used: it has 'a' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be used: Exceeds the limit (4300 digits)"),
        (b'{"a": 1}', "cannot be used: it has no b, c"),
    ],
)
def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_json(path, "delete it", ("a", "b", "c"))
    text = str(caught.value)
    assert text.startswith(f"{path} {message}") and text.endswith("; delete it") and "\n" not in text


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(FileError, match="is a folder; move it"):
        read_json(tmp_path, "move it")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(FileError, match="is not a regular file; remove it"):
        read_json(tmp_path / "a.json", "remove it")


def test_the_bound_is_for_one_file(tmp_path):
    path = tmp_path / "videos.json"
    write_json(path, {f"{n:09}.mp4": [n, n] for n in range(400_000)})
    with pytest.raises(FileError, match="more than 1,048,576 parts|larger than"):
        read_json(path, "")
    assert len(read_json(path, "", most=MAX_LIST)) == 400_000


KILLED = """
import os, signal, sys
from pathlib import Path
from sfv_jax.runtime.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, monkeypatch):
    """Also files of other names; files of living processes, and young ones of other machines, stay."""
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "manifest.json"], cwd=ROOT, check=False)
    [left] = tmp_path.iterdir()
    monkeypatch.setattr(files, "_cleared", set())
    with replacing(tmp_path / "b.json") as living:
        living.write_text("b")
        assert not left.exists()
        found = files.TEMPORARY.fullmatch(living.name)
        other = tmp_path / living.name.replace(found[1], "0" * 8).replace(found[2], "4194304")
        old = tmp_path / f".old{other.name}"
        hidden = tmp_path / ".mine.tmp"
        for path in (other, old, hidden):
            path.write_text("c")
        os.utime(old, (0, 0))
        files.clear_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {living, other, hidden}
    assert (tmp_path / "b.json").read_text() == "b"
