"""Frame of every command: flags in, exit codes out, one line instead of a traceback for errors the user can correct.

This module does not import JAX, and commands import it only when they run: `--help` and wrong flags answer at once.
"""

import difflib
import io
import itertools
import math
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from sfv_jax import choices
from sfv_jax.errors import InterruptedWork, UserError
from sfv_jax.runtime.files import one_line
from sfv_jax.runtime.plain_config import flat
from sfv_jax.runtime.stopping import Interrupt

NUMBERS = {  # list flags: allowed lengths, type and least value of the numbers, advice
    "guidance": ((2,), float, 0, "two numbers from 0, e.g. 1.0,3.0"),
    "mesh": ((2, 3), int, 1, "two or three numbers from 1, e.g. 4,2 or 1,1,8"),
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


def define_required(name: str, help: str) -> None:
    """Defines a required string flag, for which an empty string, as of `--out="$OUT"` without OUT, is refused."""
    flags.DEFINE_string(name, None, help, required=True, module_name=sys.argv[0])
    refuse_empty(name)


def refuse_empty(name: str) -> None:
    """Refuses an empty string as the value of the flag `name`."""
    flags.register_validator(name, lambda text: text is None or bool(text.strip()), "the value is empty")


def define_pixels(name: str, default: int | None, help: str, least: int = 1) -> None:
    """Defines an integer flag for a side of pictures."""
    bounds = {"lower_bound": least, "upper_bound": choices.MOST_PIXELS}
    flags.DEFINE_integer(name, default, help, **bounds, module_name=sys.argv[0])


def define_size() -> None:
    """Defines `--size`, see `apply_size`."""
    names = ", ".join(f"{name} ({height}x{width})" for name, (height, width) in choices.SIZES.items())
    text = f"HEIGHTxWIDTH of the videos in pixels, in place of --height and --width, or one of {names}"
    flags.DEFINE_string("size", None, text, module_name=sys.argv[0])


def apply_size() -> None:
    """Gives `--height` and `--width` the values of `--size`.

    Raises:
      UserError: if they are given, too, or the size is neither a name of `choices.SIZES` nor HEIGHTxWIDTH.
    """
    text = flags.FLAGS.size
    if text is None:
        return
    if flags.FLAGS["height"].present or flags.FLAGS["width"].present:
        raise UserError(f"--size={one_line(text)}: leave out --height and --width, or give both in its place")
    found = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text)
    size = choices.SIZES.get(text) or (found and (int(found[1]), int(found[2])))
    if not size or not 0 < min(size) <= max(size) <= choices.MOST_PIXELS:
        near = difflib.get_close_matches(text, choices.SIZES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        names = ", ".join(choices.SIZES)
        raise UserError(f"--size={one_line(text)}: {hint}give HEIGHTxWIDTH, such as 576x1024, or one of {names}")
    flags.FLAGS.height, flags.FLAGS.width = size


def define_fps(default: float, help: str) -> None:
    """Defines `--fps`."""
    least, most = choices.FPS
    flags.DEFINE_float("fps", default, help, lower_bound=least, upper_bound=most, module_name=sys.argv[0])


def define_seed(default: int, help: str) -> None:
    """Defines `--seed`."""
    bounds = {"lower_bound": 0, "upper_bound": choices.MOST_SEED}
    flags.DEFINE_integer("seed", default, help, **bounds, module_name=sys.argv[0])


def define_micro_conditions(noise: float | None = 0.02, note: str = "") -> None:
    """Defines `--motion_bucket_id` and `--noise_aug_strength`, with the default `noise`, which `note` explains."""
    for name, default, most, text in (
        ("motion_bucket_id", 127, choices.MOST_MOTION, "amount of motion, a condition of the model"),
        ("noise_aug_strength", noise, choices.MOST_NOISE, f"deviation of noise on the image, pixels in [-1, 1]{note}"),
    ):
        flags.DEFINE_float(name, default, text, lower_bound=0, upper_bound=most, module_name=sys.argv[0])


def define_decoder(note: str = "") -> None:
    """Defines `--decoder`; `note` is added to its help."""
    text = "decoder of frames: full (the VAE's), tiny (that of the model), or a tiny decoder's file, folder or name"
    text += note
    flags.DEFINE_string("decoder", "full", text, module_name=sys.argv[0])
    refuse_empty("decoder")


def check_decoder(more: tuple[str, ...] = ()) -> None:
    """Checks that the file or folder of the flag `decoder` exists, unless it is full, tiny, packaged or one of `more`.

    Raises:
      UserError: if it does not.
    """
    name = flags.FLAGS.decoder
    if name not in ("full", "tiny", *more) and not choices.is_there(name):
        raise UserError(f"--decoder={name}: choose full or tiny, or name the file or folder of a tiny decoder")


def run(main: Callable[[], int | None], define_flags: Callable[[], None]) -> None:
    """Defines and parses the flags, runs `main` and exits with the code that it returns.

    An error that the user can correct (a `UserError`, a wrong flag, a missing config field or file) ends the command
    with exit code 1 and one line, "COMMAND: message". `--help` exits with 0.
    """
    command = Path(sys.argv[0]).stem
    for stream in (sys.stdout, sys.stderr):  # file names may contain what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def guarded(_) -> int | None:
        logging.set_verbosity(logging.WARNING)  # orbax reports every rename
        try:
            with Interrupt():
                return main()
        except InterruptedWork as error:
            print(f"{command}: {_lines(error)}", file=sys.stderr)
            return 128 + signal.SIGINT
        except UserError as error:
            sys.exit(f"{command}: {_lines(error)}")
        except KeyboardInterrupt:
            print(f"{command}: interrupted; what is finished stays", file=sys.stderr)
            return 128 + signal.SIGINT

    def parse(argv: list[str]) -> list[str]:
        fields: list[str] = []
        try:
            define_flags()
            fields = _check_config_files(argv)
            left = flags.FLAGS(argv)[1:]
            for name in flags.FLAGS:  # a config file is read, or found unreadable, at the first access to its flag
                getattr(flags.FLAGS[name].value, "to_dict", None)
            _check_finite()
        except _BrokenConfig as error:
            sys.exit(f"{command}: {error}")
        except AttributeError as error:  # ml_collections, wrapping its KeyError
            while error.args and isinstance(error.args[0], Exception):
                error = error.args[0]
            text = " ".join(str(error.args[0]).split())
            # ml_collections: 'batchsize' Did you mean "batch_size" instead of "batchsize"?
            text, _, near = text.partition(" Did you mean ")
            near = re.sub(r" instead of .*|\"", "", near) or f"--{_same_end(argv, fields)}".removesuffix("--")
            hint = f"; did you mean {near}?" if near else ""
            sys.exit(f"{command}: no such config field: {text}{hint}")
        except flags.UnrecognizedFlagError as error:
            hint = _near(error.flagname)
            sys.exit(f"{command}: no flag --{error.flagname}; {hint and f'did you mean --{hint}? '}see --help")
        except flags.Error as error:
            if missing := re.findall(r"Flag --(\w+) must have a value other than None", str(error)):
                sys.exit(f"{command}: missing: {', '.join(f'--{name}' for name in missing)}; see --help")
            lines = [line.strip() for line in str(error).splitlines()]
            if "Traceback (most recent call last):" in lines:  # of a config file; the last line contains the message
                cause = lines[-1].removeprefix("sfv_jax.errors.UserError: ")
                sys.exit(f"{command}: {lines[0].partition('=')[0].removeprefix('flag ')}: {cause}")
            text = re.sub(
                r"invalid literal for int\(\) with base 10: ", "not a whole number: ", " ".join(filter(None, lines))
            )
            text = re.sub(r"could not convert string to float: ", "not a number: ", text)
            sys.exit(f"{command}: {text}; see --help")
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


class _BrokenConfig(UserError):
    """Config file that cannot be used."""


def _config_flags() -> dict[str, Any]:
    """Returns the flags that take a config file, by name."""
    return {name: flag for name in flags.FLAGS if hasattr(type(flag := flags.FLAGS[name]), "config_filename")}


def _check_config_files(argv: list[str]) -> list[str]:
    """Reads the config files that the command line names, and returns their fields, such as "config.sfv.p_mean".

    Raises:
      _BrokenConfig: if one does not exist, or anything but a `UserError` stops it.
    """
    words, fields = argv[1:], []
    for name, flag in _config_flags().items():
        given = [word.partition("=")[2] for word in words if re.match(rf"--?{name}=", word)]
        given += [value for word, value in itertools.pairwise(words) if re.fullmatch(rf"--?{name}", word)]
        for text in given[-1:]:
            path = Path(text.partition(":")[0])
            if path.is_file() and path.suffix != ".py":
                raise _BrokenConfig(f"--{name}: {one_line(path)} is no config file: give one with the suffix .py")
            if not path.is_file():
                known = {file.stem: str(file) for file in sorted(Path("configs").glob("*.py"))}
                near = [known[stem] for stem in difflib.get_close_matches(path.stem, known, 1)]
                hint = f"; did you mean {near[0]}?" if near else ""
                if not known and not path.is_absolute():
                    hint = f" in {Path.cwd()}, which is not the folder of the repository"
                raise _BrokenConfig(f"--{name}: there is no config file {one_line(path)}{hint}")
            try:
                fields += [f"{name}.{field}" for field in flat(flag.parser.parse(text).to_dict())]
            except flags.Error:
                raise
            except UserError:
                continue  # said when the flag is parsed
            except Exception as error:  # of any kind: the file is a program
                frames = traceback.extract_tb(error.__traceback__)
                lines = [frame.lineno for frame in frames if frame.filename == str(path)]
                line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
                where = f"{one_line(path)}, line {line}" if line else one_line(path)
                raise _BrokenConfig(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    return fields


def _same_end(argv: list[str], fields: list[str]) -> str:
    """Returns the field that ends like one of the command line that does not exist; "" if none does."""
    given = [word.partition("=")[0].lstrip("-") for word in argv if word.startswith("-")]
    ends = [f".{word.rpartition('.')[2]}" for word in given if "." in word and word not in fields]
    return next((field for end in ends for field in fields if field.endswith(end)), "")


def _near(unknown: str) -> str:
    """Returns the flag or config field whose name is like that of a flag that does not exist; "" if none is."""
    fields = {}
    for name, flag in _config_flags().items():
        if flag.value is not None:
            fields |= {f"{name}.{field}": None for field in flat(flag.value.to_dict())}
    tails = [field for field in fields if field.endswith(f".{unknown}")]
    return next(iter(tails or difflib.get_close_matches(unknown, [*flags.FLAGS, *fields], 1, 0.75)), "")


def _lines(error: UserError) -> str:
    """Returns the lines of a message without control characters, which names of files may contain."""
    return "\n".join(map(one_line, str(error).split("\n")))


def _check_finite() -> None:
    """Refuses NaN and infinity as values of flags, which pass absl's bounds; fields of a config are not checked."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value) and "." not in name:
            raise flags.IllegalFlagValueError(f"flag --{name}={value}: give a finite number")


def values(*names: str) -> dict[str, Any]:
    """Returns `{name: value}` of the named flags."""
    return {name: flags.FLAGS[name].value for name in names}


def check_inputs(*names: str) -> None:
    """Checks that the files and folders exist that the named flags give; models in the package have names instead.

    Raises:
      UserError: if one does not.
    """
    for name, value in values(*names).items():
        if value and not choices.is_there(value):
            near = difflib.get_close_matches(value, choices.PACKAGED, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            packaged = f"; models in the package: {', '.join(choices.PACKAGED)}" if name == "checkpoint" else ""
            raise UserError(f"--{name}={value} does not exist: {hint}give a file or folder{packaged}")


def share(text: str | None) -> tuple[int, int] | None:
    """Parses the flag `share`, "K/N"; None for None or "".

    Raises:
      UserError: if it has another form.
    """
    if not text:
        return None
    if not (found := re.fullmatch(r"(\d{1,9})/([1-9]\d{0,8})", text)):
        raise UserError(f"--share={text}: write K/N, such as 0/2 for every second run from the first")
    return int(found[1]), int(found[2])


def seeds(given: list[str]) -> tuple[int, ...]:
    """Converts the value of the list flag `seeds` to numbers.

    Raises:
      UserError: if it has something else than whole numbers from 0 to 2^32 - 1, or none.
    """
    if not given or not all(re.fullmatch(r"\d{1,10}", text) and int(text) <= choices.MOST_SEED for text in given):
        raise UserError(f"--seeds={','.join(given)}: give whole numbers from 0 to {choices.MOST_SEED}, e.g. 0,1,2")
    return tuple(map(int, given))


def check_seeds(first: int, count: int) -> None:
    """Checks that `count` seeds from that of the flag `seed` on are legal.

    Raises:
      UserError: if the last is not.
    """
    if first + count - 1 > choices.MOST_SEED:
        last = choices.MOST_SEED
        raise UserError(f"--seed={first}: {count} videos have the seeds from it on, and the last seed is {last}")


def numbers(name: str, given: list[str] | None) -> tuple | None:
    """Parses the list flag `name`, a key of `NUMBERS`.

    Args:
      name: the flag.
      given: the words on the command line; None or empty if the flag was not given.

    Returns:
      The numbers, or None if the flag was not given.

    Raises:
      UserError: if a word is no number or a number too small, or their count is wrong.
    """
    if not given:
        return None
    counts, kind, least, wanted = NUMBERS[name]
    try:
        found = tuple(kind(value) for value in given)
    except ValueError:
        found = ()
    if len(found) not in counts or not all(least <= number < math.inf for number in found):
        raise UserError(f"--{name}={','.join(given)}: give {wanted}")
    return found
