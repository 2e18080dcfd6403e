"""Being asked to stop: by a scheduler (SIGTERM) or a person (Ctrl-C)."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Context in which SIGTERM and the first Ctrl-C are noted instead of obeyed; the second one is obeyed.

    With several processes SIGTERM is left to JAX's preemption service: it lets all of them stop after the same step,
    whichever got the signal, and Ctrl-C keeps its usual meaning. Outside the main thread, where Python allows no
    handlers, nothing is noted.
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
        """Whether to save and stop now. To be called once after every step, by every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noted
