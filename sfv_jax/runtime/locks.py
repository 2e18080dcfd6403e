"""Locks: one owner at a time of a folder, among the processes of all machines that share its disk.

A lock is a file that names its owner. It is created by a hard link to a complete file, which local and network disks do
for one of several processes only; where there are no hard links, by exclusive creation. The locks of the operating
system (flock) would vanish with their process, but some network file systems keep them on one machine, and others
refuse them.

A lock may outlive its process. On the owner's machine its process number shows that. Other machines look for its signs
of life: the owner sets the time of the file every `SIGN` seconds, and the lock of an owner that is silent for `SILENCE`
seconds is taken over. Only changes of that time are looked for, so the clocks may differ.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from sfv_jax.errors import UserError
from sfv_jax.runtime.files import MAX_JSON, parse_json
from sfv_jax.runtime.platforms import is_alive, place

SIGN = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds


class LockError(UserError):
    """Lock that another process has; the message names that process."""


class Lock:
    """Context in which this process owns `path`, the file of the lock.

    Args:
      path: the lock; its folder must exist.
      what: what the lock protects, for messages.
    """

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.token = secrets.token_hex(8)
        self.ended = threading.Event()

    def __enter__(self) -> "Lock":
        """Takes the lock; waits up to `SILENCE` seconds for signs of life of an owner on another machine.

        Raises:
          LockError: if another process has it.
          OSError: if the folder cannot be written.
        """
        while not self._is_mine():
            if not self._create():
                found = _read(self.path)
                if found is None or not self._is_abandoned(*found) or not self._take_over(found[0]):
                    continue
            self._clear_remains()
        self.thread = threading.Thread(target=self._give_signs, name=f"lock of {self.what}", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Releases the lock, if it is still this one."""
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(OSError):  # of a disk that is gone
            if self._is_mine():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Checks that the lock is still this process's; creates it anew if somebody deleted it.

        Raises:
          LockError: if another process has taken it over.
        """
        found = _read(self.path)
        if found is None and not self._create():
            found = _read(self.path)
        if found and found[0].get("token") != self.token:
            raise LockError(f"{self.what} was taken over by {_name(found[0])}: this process was silent for too long")

    def _is_mine(self) -> bool:
        found = _read(self.path)
        return found is not None and found[0].get("token") == self.token

    def _create(self) -> bool:
        """Creates the file, with its whole content; returns False if it exists."""
        temporary = self._temporary()
        try:
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                # NFS: the link was made, but the answer got lost and the request was repeated.
                return temporary.stat().st_nlink > 1
            except FileNotFoundError:
                raise
            except OSError:  # no hard links here
                text = temporary.read_text()
                with self.path.open("x") as file:
                    file.write(text)
        except (FileExistsError, FileNotFoundError):  # not found: removed by the owner, which clears what is left
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _temporary(self) -> Path:
        """Writes a file beside the lock that names this process as owner; returns its path."""
        temporary = self.path.with_name(f".{self.path.name}.{self.token}.tmp")
        temporary.write_text(json.dumps(_this_process() | {"token": self.token}))
        return temporary

    def _take_over(self, owner: dict) -> bool:
        """Replaces the lock of `owner`, which is gone; returns False if another process did.

        Several processes may have seen that the owner is gone, some of them long ago. The one that has the lock of
        this takeover looks again and replaces the file in one step; no moment is without a lock. It has written its
        file before it looks: if it is silent for long now, whoever owns the lock then has removed that file, or sees
        after that removal that the lock is not its own.

        Raises:
          LockError: if another process is taking it over.
        """
        digest = hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()[:16]
        with Lock(self.path.with_name(f".{self.path.name}.{digest}.claim"), self.what):
            temporary = self._temporary()
            try:
                if (found := _read(self.path)) is None or found[0] != owner:
                    return False
                temporary.replace(self.path)
            except FileNotFoundError:  # removed by another owner
                return False
            finally:
                temporary.unlink(missing_ok=True)
            return True

    def _clear_remains(self) -> None:
        """Removes what other processes, killed or not, need to take this lock over: files, and locks of takeovers."""
        left = re.compile(rf"\.+{re.escape(self.path.name)}\..*\.(tmp|claim)")
        for path in self.path.parent.iterdir():
            if left.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _is_abandoned(self, owner: dict, sign: int) -> bool:
        """Returns whether the owner is gone, or the lock is not that owner's anymore.

        Raises:
          LockError: if the owner lives.
        """
        if owner.get("place") == place() and isinstance(owner.get("process"), int):
            if is_running(owner["process"], owner.get("started", "")):
                raise LockError(f"{self.what} is in use by {_name(owner)}: stop it or wait for its end")
            return True
        print(f"{self.what}: locked by {_name(owner)}; waiting {SILENCE:.0f} s for its next sign", file=sys.stderr)
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(min(0.5, SILENCE / 4))
            found = _read(self.path)
            if found is None or found[0] != owner:
                return False
            if found[1] != sign:
                raise LockError(f"{self.what} is in use by {_name(owner)}: stop it or wait for its end")
        return True

    def _give_signs(self) -> None:
        while not self.ended.wait(SIGN):
            with contextlib.suppress(OSError):  # a network disk that is away for a while
                if self._is_mine():
                    os.utime(self.path)


def _read(path: Path) -> tuple[dict, int] | None:
    """Returns the owner, {} if it is not readable, and the time of its last sign of life; None if there is no lock."""
    try:
        with path.open("rb") as file:  # network file systems look at the server when a file is opened
            text, sign = file.read(MAX_JSON), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        return parse_json(text), sign
    except ValueError:
        return {}, sign


def is_running(process: int, started: str) -> bool:
    """Returns whether a process of this machine runs that started at this time.

    Args:
      process: number of the process.
      started: its start by the kernel's clock; "" if unknown. Numbers are used again after a while.
    """
    if not is_alive(process):
        return False
    state, now = _state(process)
    return state not in ("Z", "X") and (not started or not now or started == now)


def _state(process: int) -> tuple[str, str]:
    """Returns the state of a process (Z: a zombie) and its start in ticks of the kernel; "" where there is no /proc."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _this_process() -> dict:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "place": place(),
        "started": _state(os.getpid())[1],
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _name(owner: dict) -> str:
    if not owner:
        return "an unknown process"
    return f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"
