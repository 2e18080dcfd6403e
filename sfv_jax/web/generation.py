"""From a request to videos: frames as they are decoded, times of the stages, the video and its record."""

import contextlib
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
from PIL import Image

from sfv_jax.sampling import files
from sfv_jax.sampling.stages import STAGES
from sfv_jax.web.models import Models
from sfv_jax.web.request import Limits, Request, RequestError
from sfv_jax.web.sessions import Session
from sfv_jax.web.turns import Job
from sfv_jax.web.uploads import data_url, plain_name, read_upload


def generate(models: Models, session: Session, request: Request, limits: Limits, job: Job) -> None:
    """Makes the videos of a request, and emits what happens.

    Events, besides those of `turns.Job`:
      begin: `side` (0 or 1, of two videos side by side), `title`, `frames` (their number), `height`, `width`, `fps`.
      stage: `side`, `name`, and whether it is `new` to this process and so may be compiled first.
      progress: `side`, `done` of `total` sampling steps.
      frame: `side`, `number`, and `url`, a `data:` URL of the frame.
      video: `side`, `name` of the .mp4 and of the `record` (as files of the session), `seconds` in total, `times` of
        the stages in seconds, `gone`: names of older videos that were deleted for it.

    Raises:
      UserError: if the request cannot be fulfilled.
      turns.Cancelled: if the job was cancelled.
    """
    with session.open() as folder:
        image, name, pixels = _image(models, session, folder, request, limits)
    size = models.size(*pixels.shape[:2])
    stem = Path(plain_name(name)).stem
    for side, (other, seed) in enumerate(request.sides):
        job.check()
        maker = _Maker(models, session, job, side, other)
        with session.open():
            session.made += 1
            video = f"{stem}-seed{seed}-{session.made}.mp4"
        options = request.options(seed, size)
        frames, times, seconds = maker.frames(pixels, request, options)
        began = time.monotonic()
        model = maker.model
        with session.open() as folder:
            about = {"image": name} | options | {"num_frames": len(frames)} | model.origin(request.decoder)
            about |= files.surroundings(1) | {"seconds": seconds, "times": times}
            files.write(files.Job(0, image, folder / video), frames, about)
        gone = session.add_video(video, limits.videos)
        times = times | {"save": time.monotonic() - began}
        job.emit(
            {
                "event": "video",
                "side": side,
                "name": video,
                "record": Path(video).with_suffix(".json").name,
                "seconds": seconds,
                "times": {STAGES.get(stage, "files"): value for stage, value in times.items()},
                "gone": gone,
            }
        )


def _image(
    models: Models, session: Session, folder: Path, request: Request, limits: Limits
) -> tuple[Path, str, np.ndarray]:
    """Returns the file, name and pixels uint8 `[h, w, 3]` of the image of a request."""
    if request.example is not None:
        name, pixels = f"heldout-{request.example}.png", models.examples[request.example]
        path = folder / name
        Image.fromarray(pixels).save(path)
        return path, name, pixels
    if session.image is None:
        raise RequestError("There is no image yet: drop one or choose an example.")
    name = session.image.name.split("-", 2)[2]
    return session.image, name, read_upload(session.image, name, limits)


class _Maker:
    """Maker of one video of a request: calls the sampler and emits what happens."""

    def __init__(self, models: Models, session: Session, job: Job, side: int, other: bool):
        self.session, self.job, self.side = session, job, side
        self.model = models.other if other and models.other is not None else models.main
        self.name = models.title(other)

    def emit(self, event: str, **fields) -> None:
        self.job.emit({"event": event, "side": self.side} | fields)

    def frames(self, pixels: np.ndarray, request: Request, options: dict) -> tuple[np.ndarray, dict, float]:
        """Returns the frames uint8 `[t, h, w, 3]`, the seconds of the stages and in total; emits each frame."""
        sampler = self.model.sampler(request.decoder)
        times: dict[str, float] = {}
        self.emit(
            "begin",
            title=f"{self.name}, seed {options['seed']}",
            frames=sampler.unet.num_frames,
            **{name: options[name] for name in ("height", "width", "fps")},
        )
        began, frames = time.monotonic(), []
        for frame in sampler.stream(pixels, times=times, watch=self.watch, enter=self.enter, **options):
            self.job.check()
            self.emit("frame", number=len(frames), url=data_url(frame))
            frames.append(frame)
        return np.stack(frames), times, time.monotonic() - began

    def enter(self, name: str, new: bool) -> None:
        self.job.check()
        self.emit("stage", name=STAGES[name], new=new)

    @contextlib.contextmanager
    def watch(self, total: int, what: str) -> Generator[Callable[[int], None], None, None]:
        """Emits the progress of sampling steps, see `sampler.Watch`."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.job.check()
            self.emit("progress", done=done, total=total)

        yield advance
