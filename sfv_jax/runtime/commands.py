"""Frame of every command: flags in, exit codes out, one line instead of a traceback for errors the user can correct.

This module does not import JAX, and commands import it only when they run: `--help` and wrong flags answer at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from sfv_jax.errors import UserError

NUMBERS = {  # list flags: allowed lengths, type of the numbers, advice
    "guidance": ((2,), float, "two numbers, e.g. 1.0,3.0"),
    "mesh": ((2, 3), int, "two or three numbers, e.g. 4,2 or 1,1,8"),
}
HELP = ("help", "helpshort", "helpfull", "helpxml", "h", "?")


def define_compiler_flags() -> None:
    """Defines `--compile_effort` and `--compile_memory_effort`, the arguments of `compilation.set_up`."""
    for name, aim in (
        ("compile_effort", "fast programs"),
        ("compile_memory_effort", "programs that need less memory"),
    ):
        text = f"effort of XLA for {aim}, from -1 (compile soonest) to 1, on backends that support it; default 0"
        flags.DEFINE_float(name, None, text, lower_bound=-1.0, upper_bound=1.0, module_name=sys.argv[0])


def run(main: Callable[[], int | None], define_flags: Callable[[], None]) -> None:
    """Defines and parses the flags, runs `main` and exits with the code that it returns.

    An error that the user can correct (a `UserError`, a wrong flag, a missing config field or file) ends the command
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
            for name in flags.FLAGS:  # a config file is read, or found unreadable, at the first access to its flag
                getattr(flags.FLAGS[name].value, "to_dict", None)
        except AttributeError as error:  # ml_collections, wrapping its KeyError
            while error.args and isinstance(error.args[0], Exception):
                error = error.args[0]
            sys.exit(f"{command}: no such config field: " + " ".join(str(error.args[0]).split()))
        except flags.Error as error:
            lines = [line.strip() for line in str(error).splitlines()]
            if "Traceback (most recent call last):" in lines:  # of a config file; the last line contains the message
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


def values(*names: str) -> dict[str, Any]:
    """Returns `{name: value}` of the named flags."""
    return {name: flags.FLAGS[name].value for name in names}


def seeds(given: list[str]) -> tuple[int, ...]:
    """Converts the value of the list flag `seeds` to numbers.

    Raises:
      UserError: if it has something else than whole numbers from 0.
    """
    if not all(text.isdecimal() for text in given):
        raise UserError(f"--seeds={','.join(given)}: give whole numbers from 0, e.g. 0,1,2")
    return tuple(map(int, given))


def numbers(name: str, given: list[str] | None) -> tuple | None:
    """Parses the list flag `name`, a key of `NUMBERS`.

    Args:
      name: the flag.
      given: the words on the command line; None or empty if the flag was not given.

    Returns:
      The numbers, or None if the flag was not given.

    Raises:
      UserError: if a word is not a number, or their count is wrong.
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
