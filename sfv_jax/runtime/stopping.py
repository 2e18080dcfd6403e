"""Requests to stop, by a scheduler (SIGTERM), a lost terminal (SIGHUP) or a person (Ctrl-C)."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

PAUSE = 0.5  # seconds between two Ctrl-C of a person; launchers may pass one on twice
CHILDREN: list[subprocess.Popen] = []  # processes that must not outlive this one


class Interrupt:
    """Context of a command, in which Ctrl-C is acknowledged at once, even during a compilation.

    Python calls its handlers only between two of its instructions, and a compilation is one of minutes. So a thread
    answers: the number of a signal arrives in its socket when the signal does. The first Ctrl-C then raises
    KeyboardInterrupt as soon as Python is called again; the second ends the process at once, and those of `CHILDREN`.
    Outside the main thread Python allows no signal handlers, so nothing changes there.

    Args:
      saved: function that returns a line on what is safe, printed before a second Ctrl-C ends the process.
    """

    def __init__(self, saved: Callable[[], str] = lambda: ""):
        self.saved, self.noted, self.acknowledged = saved, False, False
        self.previous: dict[int, Any] = {}
        self.interrupted: float | None = None  # time of the first Ctrl-C

    def signals(self) -> list[signal.Signals]:
        """Returns the signals that are handled: none in a background job, whose shell ignores Ctrl-C for it."""
        return [] if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else [signal.SIGINT]

    def __enter__(self) -> Self:
        signals = self.signals() if threading.current_thread() is threading.main_thread() else []
        if not signals:
            return self
        self.inlet, outlet = socket.socketpair()
        self.inlet.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.inlet.fileno(), warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, self.note) for number in signals}
        self.thread = threading.Thread(target=self._answer, args=(outlet,), name="signals", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        if not self.previous:
            return
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        self.previous = {}
        self.inlet.close()
        self.thread.join()

    def _answer(self, outlet: socket.socket) -> None:
        with outlet:
            while number := outlet.recv(1):
                if number[0] in self.previous:
                    self._answer_signal(signal.Signals(number[0]))

    def _answer_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted is not None and now - self.interrupted > PAUSE:
                _print("; ".join(filter(None, ["Ctrl-C again: ended at once", self.saved()])))
                for child in CHILDREN:
                    with contextlib.suppress(OSError):
                        child.kill()
                os._exit(128 + number)
            self.interrupted = self.interrupted or now
        if not self.acknowledged:
            self.acknowledged = True
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            _print(f"{number.name}: {self.answer(number)}{again}")

    def note(self, *_) -> None:
        """Handles a signal between two instructions; only the first, so that cleaning up is not interrupted."""
        if not self.noted:
            self.noted = True
            raise KeyboardInterrupt

    def answer(self, number: signal.Signals) -> str:
        """Returns what is said to the first signal; called by the thread."""
        return "stopping as soon as the current computation ends"


class StopRequest(Interrupt):
    """Context in which signals to stop are recorded for `asked` and acknowledged at once, see `Interrupt`.

    Signals after the first are ignored until the context ends, since schedulers send several and the state must reach
    the disk; but a second Ctrl-C ends the process at once. With several processes, JAX's preemption service handles
    SIGTERM, and the other signals are passed on as this one: all processes stop after the same step, whichever received
    the signal. Outside the main thread nothing is recorded.

    Attributes:
      next: what happens next, for the answer to the first signal.
    """

    next = "after the current step, then saving"

    def signals(self) -> list[signal.Signals]:
        found = [signal.SIGINT] + ([signal.SIGTERM] if _processes() == 1 else [])
        hangup = getattr(signal, "SIGHUP", None)  # none on Windows
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # as nohup sets it
            found.append(hangup)
        return found

    def note(self, *_) -> None:
        self.noted = True

    def answer(self, number: signal.Signals) -> str:
        self.noted = True
        if _processes() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return f"stopping {self.next}"

    def before(self) -> bool:
        """Returns whether to stop before the first step, when nothing is unsaved; always False if there are others."""
        return self.noted and _processes() == 1

    def asked(self, step: int) -> bool:
        """Returns whether to save and stop now; every process must call it once after every step."""
        if _processes() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.noted


def _processes() -> int:
    import jax  # commands use `Interrupt` before they need JAX

    return jax.process_count()


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
