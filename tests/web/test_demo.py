"""The command: what it needs, what it says, and that no file outlives it."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.web.test_sessions import encoded

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def served(checkpoint: Path, files: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Yields the process of the command, and the address that it prints; its files lie below `files`."""
    command = [sys.executable, "-u", "-m", "sfv_jax.demo", f"--checkpoint={checkpoint}", "--port=0", *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(files)},
        cwd=ROOT,
        # A shell ignores Ctrl-C for its background jobs, of which the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"open (http://127\.0\.0\.1:\d+/)", line):
                    yield process, found[1]
                    break
            else:
                raise AssertionError(said)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_and_deletes_all_files(small_folder, tmp_path, number):
    pytest.importorskip("uvicorn", reason='needs pip install -e ".[demo]"')
    with served(small_folder, tmp_path) as (process, address):
        connection = http.client.HTTPConnection(address.removeprefix("http://").strip("/"), timeout=120)

        def ask(method: str, path: str, body: bytes = b"") -> bytes:
            connection.request(method, path, body)
            response = connection.getresponse()
            content = response.read()
            assert response.status in (200, 201), content
            return content

        base = f"/api/session/{json.loads(ask('POST', '/api/session'))['session']}"
        ask("PUT", f"{base}/image?name=a.png", encoded("PNG"))
        lines = ask("POST", f"{base}/videos", b'{"example": null}').splitlines()
        assert json.loads(lines[-1]) == {"event": "end"}
        assert {path.suffix for path in tmp_path.glob("sfv-demo-*/*/*")} == {".png", ".mp4", ".json"}
        process.send_signal(number)
        assert process.wait(60) == {signal.SIGTERM: 0, signal.SIGINT: 130}[number]
    assert not list(tmp_path.glob("sfv-demo-*"))


def test_without_the_extra_one_line_tells_how_to_get_it():
    code = (
        "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv = ['demo.py']\n"
        "runpy.run_module('sfv_jax.demo', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    expected = 'demo: the page needs packages that are not installed: pip install -e ".[demo]"\n'
    assert (done.returncode, done.stderr) == (1, expected)
