"""Requests to stop, by a scheduler (SIGTERM), a lost terminal (SIGHUP) or a person (Ctrl-C)."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

PAUSE = 0.5  # seconds between two Ctrl-C of a person; launchers may pass one on twice


class StopRequest:
    """Context in which signals to stop are recorded for `asked` and acknowledged at once, even during a compilation.

    Python calls its handlers only between two of its instructions, and a compilation is one of minutes. So a thread
    answers: the number of a signal arrives in its socket when the signal does.

    Signals after the first are ignored until the context ends, since schedulers send several and the state must reach
    the disk; but a second Ctrl-C ends the process at once. With several processes, JAX's preemption service handles
    SIGTERM, and the other signals are passed on as this one: all processes stop after the same step, whichever received
    the signal. Outside the main thread Python allows no signal handlers, so nothing is recorded.

    Args:
      saved: function that returns a line on what is safe, printed before a second Ctrl-C ends the process.
    """

    def __init__(self, saved: Callable[[], str] = lambda: ""):
        self.saved, self.noted, self.acknowledged, self.previous = saved, False, False, {}
        self.interrupted: float | None = None  # time of the first Ctrl-C

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        signals = [signal.SIGINT] + ([signal.SIGTERM] if jax.process_count() == 1 else [])
        hangup = getattr(signal, "SIGHUP", None)  # none on Windows
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # as nohup sets it
            signals.append(hangup)
        self.inlet, outlet = socket.socketpair()
        self.inlet.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.inlet.fileno(), warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, self._note) for number in signals}
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

    def _note(self, *_) -> None:
        self.noted = True

    def _answer(self, outlet: socket.socket) -> None:
        with outlet:
            while number := outlet.recv(1):
                if number[0] in self.previous:
                    self._answer_signal(signal.Signals(number[0]))

    def _answer_signal(self, number: signal.Signals) -> None:
        now, self.noted = time.monotonic(), True
        if number == signal.SIGINT:
            if self.interrupted is not None and now - self.interrupted > PAUSE:
                _print(f"Ctrl-C again: ended at once; {self.saved()}")
                os._exit(128 + number)
            self.interrupted = self.interrupted or now
        if not self.acknowledged:
            self.acknowledged = True
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            _print(f"{number.name}: stopping after the current step, then saving{again}")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Returns whether to save and stop now; every process must call it once after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noted


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
