"""Serves a page on which an image becomes a video.

    python -m sfv_jax.demo --checkpoint runs/sfv

Open the address that it prints. The page answers this machine alone unless `--host` says else, and asks nothing
outside. `--compare` loads a second checkpoint, whose videos are shown beside those of the first. Files of a page are
deleted when it is closed, and when this command ends. It needs `pip install -e ".[demo]"`.
"""

import signal
import sys
from importlib.util import find_spec

from absl import flags

from sfv_jax import choices
from sfv_jax.errors import UserError
from sfv_jax.runtime import commands
from sfv_jax.web.request import Limits

FLAGS = flags.FLAGS


def main() -> int | None:
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UserError('the page needs packages that are not installed: pip install -e ".[demo]"')
    commands.apply_size()
    commands.check_inputs("checkpoint", "compare")
    commands.check_decoder()

    from sfv_jax.web import server

    listener = server.bound(FLAGS.host, FLAGS.port)
    address = listener.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    if not server.is_loopback(FLAGS.host):
        print(
            f"--host {FLAGS.host}: whoever reaches this machine reaches the page, without a password", file=sys.stderr
        )

    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.progress import say
    from sfv_jax.web import models

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    load = commands.values("dtype", "vae_dtype", "raw")
    say(f"loading {FLAGS.checkpoint}" + (f" and {FLAGS.compare}" if FLAGS.compare else ""))
    main_model = models.load(FLAGS.checkpoint, FLAGS.decoder, **load)
    other = models.load(FLAGS.compare, FLAGS.decoder, **load) if FLAGS.compare else None
    offered = models.make(main_model, other, FLAGS.height, FLAGS.width)
    limits = Limits(upload_bytes=FLAGS.max_upload_bytes, upload_pixels=FLAGS.max_upload_pixels)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    page = server.Page(offered, limits, FLAGS.host)
    try:
        server.serve(page, listener, lambda: say(f"open http://{host}:{address[1]}/ (Ctrl-C ends)"))
    except KeyboardInterrupt:
        print("demo: ended; the files of its pages are deleted", file=sys.stderr)
        return 128 + signal.SIGINT


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", "world", "model folder, name of one in the package, or workdir of a training run")
    flags.DEFINE_string("compare", None, "a second one, for videos side by side")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    for name in ("checkpoint", "compare", "host"):
        commands.refuse_empty(name)
    flags.DEFINE_integer("port", 7860, "port to listen at; 0: a free one", lower_bound=0, upper_bound=65535)
    flags.DEFINE_integer("max_upload_bytes", Limits.upload_bytes, "bytes of an image, at most", lower_bound=1)
    flags.DEFINE_integer("max_upload_pixels", Limits.upload_pixels, "pixels of an image, at most", lower_bound=1)
    commands.define_decoder("; the page also offers the others that the model has")
    commands.define_pixels("height", None, "pixels; default: from the image, or of the model's world")
    commands.define_pixels("width", None, "pixels; default: from the image, or of the model's world")
    commands.define_size()
    flags.DEFINE_enum("dtype", "float32", choices.DTYPES, "dtype of the UNet's parameters and computations")
    flags.DEFINE_enum("vae_dtype", "float32", choices.DTYPES, "compute dtype of the decoder")
    flags.DEFINE_bool("raw", False, "use the trained weights instead of their moving average (workdirs only)")
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)
