"""Runs the code cells of a notebook in one process, as Jupyter does, and can store what they print and show.

    python -m tests.support.notebook docs/quickstart.ipynb --set INSTALL=False [--set NAME=VALUE] [--write]

`--set` changes a variable of the first code cell after that cell has run. Lines that begin with `!` or `%pip` go to a
shell, with `{name}` replaced. Printed text and the value of a cell's last expression become its outputs; a picture of
Pillow becomes a PNG.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sfv_jax.runtime.files import write_text


def code_cells(notebook: dict) -> list[dict]:
    """Returns the code cells of a notebook in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source_of(cell: dict) -> str:
    """Returns the program of a cell, with calls of `_shell` in place of IPython's lines for the shell."""
    lines = [re.sub(r"^(\s*)[!%](.+)$", _call, line) for line in "".join(cell["source"]).splitlines()]
    return "\n".join(lines)


def _call(found: re.Match) -> str:
    """Returns the call for a line of the shell; of IPython's magic commands only pip is known."""
    text = found[2]
    if found[0].lstrip().startswith("%"):
        assert text.startswith("pip "), f"unknown magic command %{text}"
        text = "{sys.executable} -m " + text
    return f"{found[1]}_shell(f{text!r})"


def run_cell(program: str, names: dict[str, Any]) -> list[dict]:
    """Runs a cell with the variables `names`, and returns its outputs in the notebook's format."""
    tree = ast.parse(program)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_png_"):
            picture = io.BytesIO()
            value.quantize(128).save(picture, "PNG", optimize=True)
            data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<picture>"]}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def run(notebook: dict, settings: dict[str, str]) -> None:
    """Runs all code cells in this process and puts their outputs into `notebook`.

    Args:
      notebook: the parsed file.
      settings: values of variables of the first code cell, as Python or as plain text.

    Raises:
      ValueError: if the first code cell has no such variable.
    """
    names: dict[str, Any] = {"__name__": "__main__", "sys": sys, "_shell": lambda text: _shell(text)}
    for count, cell in enumerate(code_cells(notebook), 1):
        cell["outputs"], cell["execution_count"] = run_cell(source_of(cell), names), count
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = count
        if count == 1:
            if unknown := settings.keys() - names.keys():
                raise ValueError(f"the first cell does not set {', '.join(sorted(unknown))}")
            names.update({name: _value(text) for name, text in settings.items()})


def _shell(text: str) -> None:
    subprocess.run(text, shell=True, check=True)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebook")
    parser.add_argument("--out", type=Path, help="store the notebook with its outputs there")
    args = parser.parse_args()
    notebook = json.loads(args.notebook.read_text(encoding="utf-8"))
    run(notebook, dict(item.split("=", 1) for item in args.set))
    for path in ([args.notebook] if args.write else []) + ([args.out] if args.out else []):
        write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
