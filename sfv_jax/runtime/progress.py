"""Progress of long jobs on the terminal. Only bars need rich, which bare accelerator images lack."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Generator

LONG = 1.0  # seconds of a compilation that is reported before its program runs


@contextlib.contextmanager
def progress(total: int, what: str) -> Generator[Callable[[int], None], None, None]:
    """Yields a function that adds to the count of finished `what` (a plural noun).

    The count is a bar on a terminal, and a line every half minute elsewhere; both go to stderr.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, printed = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if done == total or time.monotonic() - printed > 30:
            printed = time.monotonic()
            print(f"{done} of {total} {what}", file=sys.stderr, flush=True)

    yield advance


def say(text: str) -> None:
    """Prints a line at once on process 0, also where nothing shows before a buffer is full (a file, a pipe)."""
    if _is_chief():
        print(text, flush=True)


def _is_chief() -> bool:
    import jax  # commands import this module before they need JAX

    return jax.process_index() == 0


@contextlib.contextmanager
def compiling(what: str) -> Generator[None, None, None]:
    """Says that a block compiles `what`, and how long that took: after a long compilation before its program runs.

    A program that JAX has in memory is not compiled, and nothing more is said.
    """
    say(f"compiling {what} ...")
    began, found, said = time.monotonic(), False, False

    def compiled(seconds: float) -> None:
        nonlocal found, said
        found = True
        if seconds >= LONG and not said:
            said = True
            say(f"compiled in {time.monotonic() - began:.0f} s")

    _listen()
    _compiled.append(compiled)
    try:
        yield
    finally:
        _compiled.remove(compiled)
    if found and not said:
        say(f"compiled in {time.monotonic() - began:.1f} s")


_compiled: list[Callable[[float], None]] = []  # called with the seconds of each compilation


@functools.cache
def _listen() -> None:
    """Makes JAX call `_compiled`; once, since older versions have no public function that removes a listener."""
    import jax

    def hear(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            for hears in _compiled:
                hears(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(hear)


class ProgressReport:
    """Progress in steps: a bar with step time and ETA on a terminal, plain lines elsewhere; silent unless `active`.

    Args:
      total: steps of the job.
      start: steps finished before.
      active: whether to show anything.
      label: name of the job.
    """

    def __init__(self, total: int, start: int = 0, active: bool = True, label: str = "train"):
        self.total, self.active, self.label = total, active, label
        self.began, self.first = time.monotonic(), start
        self.bar = None
        if active and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"))
            self.task = self.bar.add_task(label, total=total, completed=start, note="compiling")
            self.bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; without a bar, `note` prints the step."""
        if self.bar:
            self.bar.update(self.task, completed=step)
        if step == self.first + 1:  # the first step compiles, so the ETA leaves it out
            self.began = time.monotonic()

    def note(self, step: int, text: str) -> None:
        """Shows `text` (step time, losses) next to the bar, or prints it with step and ETA."""
        if self.bar:
            self.bar.update(self.task, note=text)
        elif self.active:
            done = max(step - self.first - 1, 1)
            left = (time.monotonic() - self.began) / done * (self.total - step)
            print(f"{self.label} {step}/{self.total}  eta {int(left) // 60}m{int(left) % 60:02d}s  {text}", flush=True)

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.active:
            print(text, flush=True)  # the bar moves such lines above itself

    def close(self) -> None:
        """Ends the bar."""
        if self.bar:
            self.bar.stop()


class ByteReport:
    """Progress in bytes: a bar on a terminal, a line every ten seconds elsewhere; silent unless `active`.

    Args:
      total: bytes of the job.
      active: whether to show anything.
      label: name of the job.
    """

    PAUSE = 10.0  # seconds between lines

    def __init__(self, total: int, active: bool = True, label: str = "read"):
        self.total, self.active, self.label, self.done = total, active, label, 0
        self.began = self.printed = time.monotonic()
        self.bar = None
        if active and sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn())
            self.task = self.bar.add_task(label, total=total)
            self.bar.start()

    def advance(self, count: int) -> None:
        """Adds `count` bytes to those done."""
        self.done += count
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=min(self.done, self.total))
        elif self.active and now - self.printed > self.PAUSE:
            self.printed = now
            left = int((now - self.began) / self.done * max(self.total - self.done, 0))
            print(
                f"{self.label} {self.done / 1e9:.1f}/{self.total / 1e9:.1f} GB  eta {left // 60}m{left % 60:02d}s",
                flush=True,
            )

    def close(self) -> None:
        """Ends the bar."""
        if self.bar:
            self.bar.stop()
