"""The server, asked over HTTP by what is no browser."""

import contextlib
import http.client
import json
import threading
import time
from dataclasses import replace
from urllib.parse import quote

import pytest

from sfv_jax.errors import UserError
from sfv_jax.web.request import Limits
from tests.web.test_sessions import encoded

pytest.importorskip("starlette", reason='needs pip install -e ".[demo]"')
pytest.importorskip("uvicorn", reason='needs pip install -e ".[demo]"')

from sfv_jax.web import server  # noqa: E402

LIMITS = Limits(upload_bytes=20_000, upload_pixels=10_000)


class Client:
    """What a page does."""

    def __init__(self, port: int):
        self.port = port
        self.about = self.json("POST", "/api/session", status=201)
        self.base = f"/api/session/{self.about['session']}"

    def send(self, method: str, path: str, body=None, headers=None) -> http.client.HTTPResponse:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        self.connection.request(method, path, body, headers or {})
        return self.connection.getresponse()

    def json(self, method: str, path: str, body=None, status: int = 200, headers=None) -> dict:
        response = self.send(method, path, body, headers)
        content = response.read()
        assert response.status == status, content
        return json.loads(content) if content else {}

    def generate(self, **settings) -> list[dict]:
        response = self.send("POST", f"{self.base}/videos", json.dumps(settings))
        assert response.status == 200, response.read()
        return [json.loads(line) for line in response.read().splitlines()]


@pytest.fixture(scope="module")
def running(small, tmp_path_factory):
    """A page that is served: `(page, port, folder of its files)`."""
    folder = tmp_path_factory.mktemp("served")
    page, listener, ready = server.Page(small, LIMITS, parent=folder), server.bound("127.0.0.1", 0), threading.Event()
    halt = threading.Event()

    def serve():
        with contextlib.suppress(KeyboardInterrupt):
            server.serve(page, listener, ready.set, halt)

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(60)
    yield page, listener.getsockname()[1], folder
    halt.set()
    thread.join(60)
    assert not list(folder.iterdir())


@pytest.fixture
def client(running):
    made = Client(running[1])
    yield made
    made.json("POST", f"{made.base}/end", status=204)


def test_the_page_asks_nothing_outside(client):
    for path, (name, kind) in server.FILES.items():
        response = client.send("GET", path)
        text = response.read().decode()
        assert response.status == 200 and response.headers["content-type"].startswith(kind), name
        assert "http://" not in text and "https://" not in text and "@import" not in text
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["referrer-policy"] == "no-referrer"


def test_what_a_page_is_told(client):
    about = client.about
    names = [(model["name"], model["step"], model["method"], model["frames"]) for model in about["models"]]
    assert names == [("small", None, "sfv", 3), ("other", None, "sfv", 3)]
    assert len(about["examples"]) == 8 and about["choices"]["beside"] == ["nothing", "seed", "checkpoint"]
    assert about["defaults"]["example"] == 0 and about["limits"]["bytes"] == 20_000


def test_an_image_becomes_a_video(client, running):
    got = client.json("PUT", f"{client.base}/image?name={quote('grüne Wiese.png')}", encoded("PNG"))
    assert (got["height"], got["width"], got["video"]) == (30, 40, [16, 16]) and got["preview"].startswith("data:")
    events = client.generate(example=None, seed=3)
    kinds = [event["event"] for event in events if event["event"] not in ("waiting", "pulse")]
    assert kinds == ["begin", *["stage"] * 4, *["frame"] * 3, "video", "end"]
    video = events[-2]
    for name, kind in ((video["name"], "video/mp4"), (video["record"], "application/json")):
        response = client.send("GET", f"{client.base}/files/{name}")
        assert response.status == 200 and response.headers["content-type"] == kind
        assert response.headers["content-disposition"] == f'attachment; filename="{name}"'
        content = response.read()
    assert json.loads(content)["image"] == "gr-ne-Wiese.png"
    assert [path.suffix for path in running[2].rglob("*.*")].count(".mp4") == 1
    client.json("POST", f"{client.base}/end", status=204)
    assert not list(running[2].glob("*/*"))
    gone = client.json("GET", f"{client.base}/files/{video['name']}", status=410)
    assert "has ended" in gone["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "not an image of a known kind"),
        (bytes(20_001), "larger than 20,000 bytes"),
        (encoded("PNG")[:70], "cannot read"),
    ],
    ids=["unknown", "heavy", "cut"],
)
def test_bad_images_are_sentences(client, content, message):
    assert message in client.json("PUT", f"{client.base}/image?name=x.png", content, 400)["message"]


def test_an_upload_without_a_length_is_bounded(client):
    """Chunks of unknown number: the server stops at its limit, and does not read what follows."""
    sent = 0

    def endless():
        nonlocal sent
        while sent < 2000:
            sent += 1
            yield bytes(10_000)

    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        answer = client.send("PUT", f"{client.base}/image", endless())
        assert answer.status == 400 and "larger than" in json.loads(answer.read())["message"]
    assert sent <= 2000 and not client.json("POST", f"{client.base}/alive", status=204)


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 30_000, b'{"seed": -1}', b'{"beside": 3}', b'"x"'], ids=len)
def test_bad_requests_are_sentences(client, body):
    assert client.json("POST", f"{client.base}/videos", body, 400)["message"].endswith(".")
    assert client.generate()[-1] == {"event": "end"}  # the page goes on


def test_errors_of_a_generation_are_sentences(client):
    last = client.generate(sampler="sfv", num_inference_steps=50)[-1]
    assert last["event"] == "error" and last["message"].endswith(".") and "Traceback" not in last["message"]


def test_other_origins_are_refused(client):
    for headers in (
        {"Host": "evil.example"},
        {"Host": ""},
        {"Host": "["},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ):
        assert "own page" in client.json("POST", "/api/session", headers=headers, status=403)["message"]
    own = {"Host": f"localhost:{client.port}", "Origin": f"http://localhost:{client.port}"}
    one = client.json("POST", "/api/session", headers=own, status=201)
    client.json("POST", f"/api/session/{one['session']}/end", status=204)


def test_a_page_that_goes_stops_its_video(client, running, monkeypatch):
    """The next one does not wait for it."""
    began, page = threading.Event(), running[0]
    sampler = page.models.main.first

    def slow(*args, enter, **options):
        began.set()
        while True:
            enter("denoise", False)
            time.sleep(0.01)

    monkeypatch.setattr(sampler, "stream", slow)
    response = client.send("POST", f"{client.base}/videos", "{}")
    assert began.wait(60)
    busy = client.json("PUT", f"{client.base}/image", encoded("PNG"), 400)
    assert busy["message"] == "This page makes a video already: wait for it, or stop it."
    response.close()
    client.connection.close()
    monkeypatch.undo()
    other = Client(client.port)
    assert other.generate()[-1] == {"event": "end"}
    other.json("POST", f"{other.base}/end", status=204)


def test_a_port_in_use_is_one_line():
    taken = server.bound("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(UserError, match="cannot listen at 127.0.0.1, port .*: .*; give another --port"):
        server.bound("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="give another --port or --host"):
        server.bound("300.1.1.1", 0)


def test_addresses_of_this_machine():
    assert all(map(server.is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(server.is_loopback, ("0.0.0.0", "::", "192.0.2.1", "example.org", "")))


def test_limits_are_flags(small):
    told = server.about(small, replace(LIMITS, upload_bytes=5, upload_pixels=6))
    assert (told["limits"]["bytes"], told["limits"]["pixels"]) == (5, 6)
