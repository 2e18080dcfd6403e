"""Files of a session: bounded, unreadable ones refused in a sentence, and gone with the page or the process."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfv_jax.web.request import Limits, RequestError
from sfv_jax.web.sessions import SessionEnded, Sessions
from sfv_jax.web.uploads import LOSSLESS, data_url, plain_name, receive

SMALL = Limits(upload_bytes=20_000, upload_pixels=10_000, sessions=2, videos=2)


@pytest.fixture
def sessions(tmp_path):
    made = Sessions(SMALL, tmp_path)
    yield made
    made.close()
    assert not list(tmp_path.iterdir())


def encoded(kind: str, size=(40, 30), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 200 if mode in ("1", "L") else (200, 50, 100)).save(buffer, kind, **options)
    return buffer.getvalue()


def files(sessions: Sessions) -> list[str]:
    return sorted(path.name for path in sessions.root.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_an_image_becomes_that_of_the_session(sessions, kind):
    session = sessions.begin()
    height, width, preview = receive(session, f"my cat.{kind.lower()}", encoded(kind), SMALL)
    assert (height, width) == (30, 40) and preview.startswith("data:image/png;base64,")
    receive(session, "second.png", encoded("PNG"), SMALL)
    assert files(sessions) == ["upload-2-second.png"] == [session.image.name]  # the former is deleted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "The file is empty."),
        ("a.png", bytes(20_001), "The file is larger than 20,000 bytes, the limit here."),
        ("a.png", encoded("PNG")[:60], "a.png: cannot read the image: "),
        ("a.jpg", b"<html>", "a.jpg: cannot read the image: not an image of a known kind"),
        ("big.png", encoded("PNG", (101, 100), "1"), "big.png: 101x100 (width x height) is more than 0.01 megapixels"),
        (
            "bomb.png",
            encoded("PNG", (20_000, 20_000), "1", compress_level=9)[:5000],
            "bomb.png: more than 0.01 megapix",
        ),
        (
            "a\n.eps",
            encoded("EPS"),
            "a\\n.eps: cannot read the image: not an image of a known",
        ),  # Pillow would run Ghostscript
        ("a.ppm", encoded("PPM"), "a.ppm: cannot read the image: not an image of a known"),
    ],
    ids=["empty", "heavy", "cut", "html", "big", "bomb", "eps", "ppm"],
)
def test_what_is_no_image_here_is_refused_in_a_sentence(sessions, name, content, message):
    session = sessions.begin()
    receive(session, "good.png", encoded("PNG"), SMALL)
    with pytest.raises(RequestError) as caught:
        receive(session, name, content, SMALL)
    said = str(caught.value)
    assert said.startswith(message) and said.endswith(".") and str(sessions.root) not in said and said.isprintable()
    assert files(sessions) == ["upload-1-good.png"] == [session.image.name]


def test_names_cannot_leave_the_folder():
    names = {
        "../../etc/passwd": "passwd",
        "C:\\x\\cat 1.PNG": "cat-1.PNG",
        ".png": "image.png",
        "": "image",
        "..": "image",
        'a"\r\nb.jpg': "a-b.jpg",
        "猫.png": "image.png",
        "a" * 300 + ".jpeg": "a" * 40 + ".jpeg",
    }
    assert {name: plain_name(name) for name in names} == names


def test_large_pictures_are_sent_as_jpeg():
    assert data_url(np.zeros((LOSSLESS // 64, 64, 3), np.uint8)).startswith("data:image/png")
    assert data_url(np.zeros((LOSSLESS // 64 + 1, 64, 3), np.uint8)).startswith("data:image/jpeg")


def test_files_go_with_the_session(sessions):
    one, two = sessions.begin(), sessions.begin()
    for session in (one, two):
        receive(session, "a.png", encoded("PNG"), SMALL)
    assert os.stat(sessions.root).st_mode & 0o077 == 0
    sessions.end(one.id)
    sessions.end(one.id)  # again: nothing
    assert len(files(sessions)) == 1
    with pytest.raises(SessionEnded, match="has ended and its files are deleted"):
        sessions.find(one.id)
    with pytest.raises(SessionEnded):
        receive(one, "late.png", encoded("PNG"), SMALL)
    assert not one.folder.exists()
    assert sessions.find(two.id) is two


def test_a_session_ends_only_between_two_uses(sessions):
    """What writes a file into a folder finishes before it is deleted."""
    session, ended = sessions.begin(), threading.Event()
    with session.open() as folder:
        thread = threading.Thread(target=lambda: (sessions.end(session.id), ended.set()))
        thread.start()
        assert not ended.wait(0.1) and folder.is_dir()
        (folder / "late").write_bytes(b"x")
    assert ended.wait(10) and not folder.exists()
    thread.join()


def test_pages_that_do_not_answer_end(sessions):
    idle, busy = sessions.begin(), sessions.begin()
    with pytest.raises(RequestError, match="2 pages are open, which is the limit"):
        sessions.begin()
    busy.busy = True
    idle.seen = busy.seen = time.monotonic() - SMALL.idle - 1
    third = sessions.begin()
    assert not idle.folder.exists() and busy.folder.exists() and third.folder.exists()


def test_the_oldest_videos_make_room(sessions):
    session = sessions.begin()
    for n in range(3):
        for suffix in ("mp4", "json"):
            (session.folder / f"v{n}.{suffix}").write_bytes(b"x")
        gone = session.add_video(f"v{n}.mp4", 2)
    assert gone == ["v0.mp4"] and files(sessions) == ["v1.json", "v1.mp4", "v2.json", "v2.mp4"]
    assert session.file("v2.json").name == "v2.json"
    for name in ("v0.mp4", "../x", "upload-1-a.png", ""):
        with pytest.raises(RequestError, match="no such file"):
            session.file(name)


def test_files_go_with_a_killed_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sfv_jax.web.sessions import *\n"
        "sessions = Sessions(Limits(), Path(sys.argv[1])); (sessions.begin().folder / 'a').write_bytes(b'x')\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n" and len(list(tmp_path.glob("*/*/a"))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(600):
        if not list(tmp_path.iterdir()):
            return
        time.sleep(0.1)
    raise AssertionError(list(Path(tmp_path).rglob("*")))
