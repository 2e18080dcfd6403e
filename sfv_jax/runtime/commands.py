"""Running a command: flags in, one line instead of a traceback for what a user can put right, exit codes out.

This module imports no JAX, and commands import theirs when they run, so that `--help` and wrong flags answer at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from sfv_jax.errors import UserError

NUMBERS = {  # list flags: how many numbers, their type, what to write
    "guidance": ((2,), float, "two numbers, e.g. 1.0,3.0"),
    "mesh": ((2, 3), int, "two or three numbers, e.g. 4,2 or 1,1,8"),
}
HELP = ("help", "helpshort", "helpfull", "helpxml", "h", "?")


def define_compiler_flags() -> None:
    """Defines `--compile_effort` and `--compile_memory_effort`, the arguments of `compilation.set_up`."""
    for name, what in (
        ("compile_effort", "fast programs"),
        ("compile_memory_effort", "programs that need less memory"),
    ):
        text = f"XLA's effort for {what}, from -1 (compile soonest) to 1, where its backend heeds it; default 0"
        flags.DEFINE_float(name, None, text, lower_bound=-1.0, upper_bound=1.0, module_name=sys.argv[0])


def run(main: Callable[[], int | None], define_flags: Callable[[], None]) -> None:
    """Defines and parses the flags, runs `main` and exits with what it returns.

    What a user can put right (a `UserError`, a wrong flag, a config field or file that does not exist) ends the command
    with exit code 1 and one line, "COMMAND: message". `--help` exits with 0.
    """
    command = Path(sys.argv[0]).stem

    def guarded(_) -> int | None:
        logging.set_verbosity(logging.WARNING)  # orbax reports every rename
        try:
            return main()
        except UserError as error:
            sys.exit(f"{command}: {error}")

    def parse(argv: list[str]) -> list[str]:
        try:
            define_flags()
            left = flags.FLAGS(argv)[1:]
            for name in flags.FLAGS:  # a config file that cannot be read is noticed when it is asked for
                getattr(flags.FLAGS[name].value, "to_dict", None)
        except AttributeError as error:  # ml_collections, wrapping its KeyError
            while error.args and isinstance(error.args[0], Exception):
                error = error.args[0]
            sys.exit(f"{command}: no such config field: " + " ".join(str(error.args[0]).split()))
        except flags.Error as error:
            lines = [line.strip() for line in str(error).splitlines()]
            if "Traceback (most recent call last):" in lines:  # of a config file: its last line says what is wrong
                lines = [lines[0], lines[-1].removeprefix("sfv_jax.errors.UserError: ")]
            sys.exit(f"{command}: {' '.join(filter(None, lines))}; see --help")
        except OSError as error:
            sys.exit(f"{command}: {' '.join(str(error).split())}")
        except SystemExit:
            if {argument.lstrip("-") for argument in argv[1:]} & set(HELP):
                sys.exit(0)
            raise
        if left:
            sys.exit(f"{command}: flags only, but got {' '.join(left)!r}; see --help")
        return argv

    app.run(guarded, argv=sys.argv, flags_parser=parse)


def values(*names: str) -> dict:
    """`{name: value}` of flags."""
    return {name: flags.FLAGS[name].value for name in names}


def numbers(name: str, given: list[str] | None) -> tuple | None:
    """The value of the list flag `name`, one of `NUMBERS`; None if it was not given.

    Raises:
      UserError: if it has too few or many numbers, or something else.
    """
    if not given:
        return None
    counts, kind, wanted = NUMBERS[name]
    try:
        found = tuple(kind(value) for value in given)
    except ValueError:
        found = ()
    if len(found) not in counts:
        raise UserError(f"--{name}={','.join(given)}: give {wanted}")
    return found
