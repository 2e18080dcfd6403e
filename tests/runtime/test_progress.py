"""Lines on what a command does: printed at once, by process 0 alone, and before the programs that they announce run."""

import io
import sys

import jax
import jax.numpy as jnp
import pytest

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
        assert "compiled in" in pipe.shown
    assert pipe.shown.count("compiled in") == 1
    with progress.compiling("it again"):  # it is there already
        function(jnp.ones(3))
    function(jnp.ones(4))
    assert pipe.shown.endswith("compiling it again ...\n")


def test_a_short_compilation_is_said_once(monkeypatch):
    pipe = piped(monkeypatch)
    with progress.compiling("two sums"):
        for n in (2, 3):
            jax.jit(lambda x: jnp.sum(x) * 11)(jnp.ones(n))
    assert pipe.shown.count("compiled in") == 1


def test_a_block_that_fails_leaves_nothing_that_listens():
    with pytest.raises(ZeroDivisionError), progress.compiling("nothing"):
        1 / 0  # noqa: B018
    assert not progress._compiled
