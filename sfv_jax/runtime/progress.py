"""Progress of long jobs on the terminal. Only bars need rich, which bare accelerator images lack."""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Generator

LONG = 1.0  # seconds of a compilation that is reported before its program runs
BAR = 16  # characters
PATIENCE = 60.0  # seconds between two lines of a compilation


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

    A line every minute tells that it goes on, since XLA's own warning of slow compilations reads like an error.
    Programs that were stored by an earlier process are traced and read; that is said as well. A program that JAX has
    in memory is not compiled, and nothing more is said.
    """
    say(f"compiling {what} ...")
    work = _Work()
    _listen()
    _works.append(work)
    ticker = threading.Thread(target=work.tick, name="compiling", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        _works.remove(work)
        work.ended.set()
    if work.found and not work.said:
        work.say_end(1)


class _Work:
    """What is known of the compilations of a block."""

    def __init__(self):
        self.began, self.ended = time.monotonic(), threading.Event()
        self.found = self.said = False
        self.stored = True  # every program so far was read from the cache

    def tick(self) -> None:
        """Prints a line every `PATIENCE` seconds until the end."""
        while not self.ended.wait(PATIENCE):
            say(f"still tracing or compiling, after {time.monotonic() - self.began:.0f} s")

    def hear(self, seconds: float, stored: bool) -> None:
        """Notes a compilation of some seconds."""
        self.found, self.stored = True, self.stored and stored
        if seconds >= LONG and not self.said:
            self.said = True
            self.ended.set()
            self.say_end(0)

    def say_end(self, digits: int) -> None:
        """Says how long it took, to some digits after the point."""
        how = "traced and read from the cache of programs" if self.stored else "compiled"
        say(f"{how} in {time.monotonic() - self.began:.{digits}f} s")


_works: list[_Work] = []  # of the blocks that are running


@functools.cache
def _listen() -> None:
    """Makes JAX tell `_works`; once, since older versions have no public function that removes a listener."""
    import jax

    stored = False  # JAX tells of a hit before it tells how long the program took

    def hit(event: str, **_: str | int) -> None:
        nonlocal stored
        stored = stored or event == "/jax/compilation_cache/cache_hits"

    def hear(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal stored
        if event.endswith("backend_compile_duration"):
            for work in _works:
                work.hear(duration_secs, stored)
            stored = False

    jax.monitoring.register_event_listener(hit)
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
        self.began, self.first, self.step = time.monotonic(), start, start
        self.bar = None
        if active and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            name = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            # In a narrow terminal the note gives way.
            note = TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis"))
            columns = (name, BarColumn(BAR), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, note, expand=True)
            self.task = self.bar.add_task(label, total=total, completed=start, note="compiling")
            self.bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; without a bar, `note` prints the step."""
        self.step = step
        first = step == self.first + 1  # it compiles, so the ETA leaves it out
        if self.bar:
            self.bar.update(self.task, completed=step)
        if self.bar and first:
            self.bar.update(self.task, note="")
        if first:
            self.began = time.monotonic()

    def note(self, step: int, text: str) -> None:
        """Shows `text` (step time, losses) next to the bar, or prints it with step and ETA."""
        if self.bar:
            self.bar.update(self.task, note=text)
        elif self.active:
            print(f"{self.label} {step}/{self.total}  {self.eta(step)}{text}", flush=True)

    def eta(self, step: int) -> str:
        """Returns the time that is left after `step`, from the mean time of the steps after the first; "" without any.

        The newest step that was started is a later one, but the device may not have finished it.
        """
        done = self.step - self.first - 1
        if done < 1:
            return ""
        left = round((time.monotonic() - self.began) / done * (self.total - step))
        return f"eta {left // 60}m{left % 60:02d}s  "

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
