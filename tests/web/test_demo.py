"""The command: what it needs, and what it says."""

import subprocess
import sys
from pathlib import Path


def test_without_the_extra_one_line_tells_how_to_get_it():
    code = (
        "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv = ['demo.py']\n"
        "runpy.run_module('sfv_jax.demo', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    expected = 'demo: the page needs packages that are not installed: pip install -e ".[demo]"\n'
    assert (done.returncode, done.stderr) == (1, expected)
