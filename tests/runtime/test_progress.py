"""Lines on what a command does: printed at once, by process 0 alone, and before the programs that they announce run."""

import io
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sfv_jax.runtime import progress


class Pipe(io.StringIO):
    """A stream that is no terminal and shows nothing before it is flushed, as a pipe or file."""

    def __init__(self):
        super().__init__()
        self.shown = ""

    def flush(self):
        self.shown = self.getvalue()


def piped(monkeypatch) -> Pipe:
    """Replaces the standard output; called by tests, because pytest replaces it, too, before it calls them."""
    stream = Pipe()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def ends(pipe: Pipe) -> int:
    """Returns how often the end of a compilation was said; an earlier session may have stored the program."""
    return pipe.shown.count("compiled in") + pipe.shown.count("read from the cache of programs in")


def report(text: str) -> None:
    progress.ProgressReport(4, active=jax.process_index() == 0).print(text)


@pytest.mark.parametrize("say", [progress.say, report])
def test_a_line_is_shown_at_once_and_by_process_0_alone(monkeypatch, say):
    pipe = piped(monkeypatch)
    say("hello")
    assert pipe.shown == "hello\n"
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    say("again")
    with progress.compiling("nothing"):
        jax.jit(lambda x: x + 3)(jnp.ones(5))
    assert pipe.getvalue() == "hello\n"


def test_a_compilation_is_announced_and_its_end_said_before_the_program_has_run(monkeypatch):
    pipe = piped(monkeypatch)
    monkeypatch.setattr(progress, "LONG", 0.0)
    function = jax.jit(lambda x: jnp.cos(x) * 7)
    with progress.compiling("a cosine"):
        assert pipe.shown == "compiling a cosine ...\n"
        function(jnp.ones(3))
        assert ends(pipe) == 1
    assert ends(pipe) == 1
    with progress.compiling("it again"):  # it is there already
        function(jnp.ones(3))
    function(jnp.ones(4))
    assert pipe.shown.endswith("compiling it again ...\n")


def test_a_short_compilation_is_said_once(monkeypatch):
    pipe = piped(monkeypatch)
    with progress.compiling("two sums"):
        for n in (2, 3):
            jax.jit(lambda x: jnp.sum(x) * 11)(jnp.ones(n))
    assert ends(pipe) == 1


def test_a_block_that_fails_leaves_nothing_that_listens():
    with pytest.raises(ZeroDivisionError), progress.compiling("nothing"):
        1 / 0  # noqa: B018
    assert not progress._works


def test_a_long_compilation_shows_that_it_goes_on(monkeypatch):
    pipe = piped(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with progress.compiling("a long one"):
        while "still tracing or compiling, after" not in pipe.shown:
            time.sleep(0.01)
    seen = pipe.shown
    time.sleep(0.05)
    assert pipe.shown == seen  # nothing more after the end


def test_a_program_that_was_stored_is_not_called_compiled(monkeypatch, tmp_path):
    pipe = piped(monkeypatch)
    kept = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    kept |= {"jax_enable_compilation_cache": True, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in kept}
    try:
        for name, value in kept.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for said in ("compiled in", "read from the cache of programs in"):
            earlier = len(pipe.shown)
            with progress.compiling("a product"):
                jax.jit(lambda x: jnp.sin(x) * 29 + 1)(np.ones(7, np.float32))
            assert said in pipe.shown[earlier:]
            jax.clear_caches()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_the_time_left_counts_from_the_step_that_is_shown(monkeypatch, capsys):
    """Later steps were started, but may not be done; at the first step no time is known."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    report = progress.ProgressReport(101, label="sfv")
    report.advance(1)
    report.note(1, "loss 3")
    for step in range(2, 22):
        now[0] += 3.0
        report.advance(step)
    report.note(11, "loss 2")
    assert capsys.readouterr().out == "sfv 1/101  loss 3\nsfv 11/101  eta 4m30s  loss 2\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_the_step_and_cuts_the_metrics(monkeypatch, width):
    """The step and the time left stay; "compiling" ends with the first step."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("COLUMNS", str(width)), ("TERM", "xterm"), ("LINES", "25")):
        monkeypatch.setenv(name, value)
    report = progress.ProgressReport(150, label="sfv")
    report.bar.refresh()
    assert "compiling" in terminal.getvalue()
    report.advance(1)
    seen = len(terminal.getvalue())
    report.bar.refresh()
    assert "compiling" not in terminal.getvalue()[seen:]
    report.advance(14)
    report.note(13, "1.776 s/step  " + "  ".join(f"loss{n} 0.123" for n in range(12)))
    seen = len(terminal.getvalue())
    report.bar.refresh()
    assert "14/150" in terminal.getvalue()[seen:] and "1.776 s/step" in terminal.getvalue()[seen:]
    report.close()
