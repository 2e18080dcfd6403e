"""Requests to stop, by a scheduler (SIGTERM) or a person (Ctrl-C)."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Context in which the first SIGTERM or Ctrl-C is only recorded, for `asked`; the second takes effect at once.

    With several processes, JAX's preemption service handles SIGTERM: all of them stop after the same step, whichever
    received the signal, and Ctrl-C has its usual effect. Outside the main thread Python allows no signal handlers, so
    nothing is recorded.
    """

    def __init__(self):
        self.noted, self.previous = False, {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _note(self, *_) -> None:
        self.noted = True
        self.__exit__()

    def asked(self, step: int) -> bool:
        """Returns whether to save and stop now; every process must call it once after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noted
