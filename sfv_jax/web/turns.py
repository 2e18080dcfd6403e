"""One job at a time per process, in the order of their arrival. This module does not import JAX."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from sfv_jax.errors import UserError
from sfv_jax.web.request import RequestError

Emit = Callable[[dict[str, Any]], None]


class Cancelled(Exception):
    """The job is not wanted anymore."""


class Job:
    """Work that waits for its turn.

    Args:
      work: function of the job; it sends events to `emit`, and calls `check` often.
      emit: receives the events of the job, as JSON objects: those of `work`, "waiting" with the number of jobs `ahead`
        whenever that changes, and at last "error" with a `message`, or "end". Called by a thread of its own.
    """

    def __init__(self, work: Callable[["Job"], None], emit: Emit):
        self.work, self.emit = work, emit
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the job at its next `check`, or before it begins."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises Cancelled if the job was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled

    def run(self) -> None:
        """Does the work and emits its end."""
        try:
            self.check()
            self.work(self)
        except Cancelled:
            self.emit({"event": "error", "message": "Stopped."})
        except UserError as error:
            self.emit({"event": "error", "message": sentence(error)})
        except Exception as error:
            self.emit({"event": "error", "message": f"An error of the program ({type(error).__name__}); see its log."})
            raise
        else:
            self.emit({"event": "end"})


class Turns:
    """Queue of jobs, and the thread that runs them one after another.

    Args:
      most: number of jobs that may wait.
      failed: called with an exception that no user caused.
    """

    def __init__(self, most: int, failed: Callable[[Exception], None]):
        self.most, self.failed = most, failed
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        # A daemon: a compilation cannot be interrupted, and must not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Lets a job wait for its turn.

        Raises:
          RequestError: if too many wait.
        """
        with self._changed:
            if len(self._waiting) >= self.most:
                raise RequestError(f"{self.most} videos are waiting already, which is the limit: try again later.")
            self._waiting.append(job)
            self._tell()
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancels a job, whether it waits, runs or has ended."""
        job.cancel()
        with self._changed:
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
                self._tell()
        if waited:
            job.run()

    def close(self, seconds: float = 5.0) -> None:
        """Cancels all jobs, and waits for the running one at most `seconds`."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify()
        self._thread.join(seconds)

    def _tell(self) -> None:
        for n, job in enumerate(self._waiting):
            job.emit({"event": "waiting", "ahead": n + (self._running is not None)})

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = self._waiting.popleft()
                self._tell()
            try:
                self._running.run()
            except Exception as error:
                self.failed(error)


def sentence(error: Exception) -> str:
    """Returns the message of an error as a sentence."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
