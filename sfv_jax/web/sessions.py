"""Sessions of open pages and their files, which are deleted when the page is closed and when the process ends.

All files lie below one folder of the process, which only its user can read. This module does not import JAX.
"""

import contextlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from sfv_jax.web.request import Limits, RequestError

# The process that runs this outlives a killed server, and then deletes its files.
_WARDEN = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


class SessionEnded(RequestError):
    """The page of a session is closed; its files are gone."""

    def __init__(self):
        super().__init__("This session has ended and its files are deleted. Reload the page for a new one.")


@dataclass
class Session:
    """One open page.

    Attributes:
      id: secret name, by which the page is known.
      folder: folder of its files.
      seen: time of its last request, of `time.monotonic`.
      image: the file of the image to animate, if any.
      videos: names of its videos, oldest first.
      busy: whether a request of it waits or runs.
      ended: whether its files are deleted.
    """

    id: str
    folder: Path
    seen: float
    image: Path | None = None
    videos: list[str] = field(default_factory=list)
    made: int = 0
    busy: bool = False
    ended: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextlib.contextmanager
    def open(self) -> Generator[Path, None, None]:
        """Yields the folder, which is not deleted meanwhile.

        Raises:
          SessionEnded: if it was deleted.
        """
        with self._lock:
            if self.ended:
                raise SessionEnded
            yield self.folder

    def end(self) -> None:
        """Deletes the files; no later `open` makes new ones."""
        with self._lock:
            self.ended = True
            shutil.rmtree(self.folder, ignore_errors=True)

    def replace_image(self, image: Path | None) -> None:
        """Notes another image and deletes the one before."""
        with self.open():
            if self.image is not None and self.image != image:
                self.image.unlink(missing_ok=True)
            self.image = image

    def add_video(self, name: str, most: int) -> list[str]:
        """Notes a video, deletes the oldest ones above `most`, and returns the names of these."""
        with self.open() as folder:
            self.videos.append(name)
            gone, self.videos = self.videos[:-most], self.videos[-most:]
            for old in gone:
                for suffix in (".mp4", ".json"):
                    (folder / old).with_suffix(suffix).unlink(missing_ok=True)
            return gone

    def file(self, name: str) -> Path:
        """Returns the video or record of that name.

        Raises:
          RequestError: if the session has none.
        """
        for video in self.videos:
            for path in (self.folder / video, (self.folder / video).with_suffix(".json")):
                if path.name == name and path.is_file():
                    return path
        raise RequestError("There is no such file anymore.")


class Sessions:
    """All open pages of a process.

    Args:
      limits: how many there may be, and for how long.
      parent: folder in which that of the files is made; default: the system's for temporary files.
    """

    def __init__(self, limits: Limits, parent: Path | None = None):
        self.limits = limits
        self.root = Path(tempfile.mkdtemp(prefix="sfv-demo-", dir=parent))  # mode 0700
        command = [sys.executable, "-I", "-S", "-c", _WARDEN, str(self.root)]
        # In a group of its own, so that Ctrl-C in a terminal does not end it before the server.
        self._warden = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def begin(self) -> Session:
        """Returns a new session.

        Raises:
          RequestError: if too many pages are open.
        """
        self.sweep()
        with self._lock:
            if len(self._open) >= self.limits.sessions:
                raise RequestError(f"{len(self._open)} pages are open, which is the limit: close one and reload.")
            name = secrets.token_urlsafe(24)
            folder = Path(tempfile.mkdtemp(dir=self.root))
            self._open[name] = Session(name, folder, time.monotonic())
            return self._open[name]

    def find(self, name: str) -> Session:
        """Returns the session of that name, which was seen now.

        Raises:
          SessionEnded: if there is none.
        """
        with self._lock:
            session = self._open.get(name)
            if session is None:
                raise SessionEnded
            session.seen = time.monotonic()
            return session

    def end(self, name: str) -> None:
        """Ends a session and deletes its files; does nothing if there is none."""
        with self._lock:
            session = self._open.pop(name, None)
        if session is not None:
            session.end()

    def sweep(self) -> None:
        """Ends sessions whose pages have not answered for `limits.idle` seconds."""
        before = time.monotonic() - self.limits.idle
        with self._lock:
            gone = [name for name, session in self._open.items() if session.seen < before and not session.busy]
        for name in gone:
            self.end(name)

    def close(self) -> None:
        """Ends all sessions and deletes the folder of the process."""
        for name in list(self._open):
            self.end(name)
        shutil.rmtree(self.root, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._warden.communicate(timeout=10)
