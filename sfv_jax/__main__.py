"""Runs a command: `sfv COMMAND ...` or `python -m sfv_jax COMMAND ...`, the same as `python -m sfv_jax.COMMAND ...`."""

import difflib
import runpy
import sys

COMMANDS = {  # in the order of a project
    "quickstart": "makes a video with the model in the package, distills another, and compares, in minutes",
    "convert": "converts SVD's weights to a model folder, and runs back to diffusers and ComfyUI",
    "prepare": "converts a folder of videos to a latent cache",
    "train": "trains a model",
    "sample": "makes videos from images",
    "demo": "serves a page on which an image becomes a video",
    "evaluate": "scores videos or a checkpoint",
    "plan": "predicts memory and time of a job on accelerators that need not be there",
    "benchmark": "times the networks on the device at hand",
    "reproduce": "makes the tables of the paper",
}
HELP = ("help", "-h", "--help", "-help", "--helpfull", "--helpshort")


def main() -> None:
    """Runs the command that the first argument names with the others, or lists the commands."""
    name, *arguments = sys.argv[1:] or ["help"]
    if name in HELP:
        width = max(map(len, COMMANDS))
        print("usage: sfv COMMAND [--flag=value ...]\n")
        print("\n".join(f"  {command:{width}}  {what}" for command, what in COMMANDS.items()))
        print("\n`sfv COMMAND --help` lists the flags of a command; docs/commands.md tells more.")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.exit(f"sfv: no command {name!r}; {hint}`sfv --help` lists them")
    sys.argv = [f"{name}.py", *arguments]
    runpy.run_module(f"sfv_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
