"""Restores Ctrl-C and keeps compiled Python, also for the commands that tests start.

It is loaded before `tests/conftest.py` imports JAX. A shell's background job ignores Ctrl-C, one under nohup SIGHUP,
and so would the commands whose answer to these is tested.

With PYTHONDONTWRITEBYTECODE, and packages that were installed without bytecode, as uv installs them, each command
compiles the source of all that it imports: 7 of the 11 seconds of CPU time that `import sfv_jax.training.loop` took.
"""

import os
import signal
import sys
from importlib.util import cache_from_source, find_spec
from pathlib import Path

if sys.dont_write_bytecode and not Path(cache_from_source(find_spec("jax").origin)).exists():
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(Path(__file__).parent / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
