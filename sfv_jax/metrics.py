"""Where numbers go: JSONL always, TensorBoard beside it, and one line or a progress bar for the person who waits."""

import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tensorboardX import SummaryWriter

from sfv_jax.config import ConfigError


class MetricWriter:
    """Scalars and pictures of a run, written by process 0 only.

    `workdir/metrics.jsonl` gets one object per call of `scalars` (null where a number is not finite) and per alarm;
    `workdir/tensorboard` the same plus the pictures, and so does the Weights & Biases project `wandb_project`, if any.

    Raises:
      ConfigError: if wandb is wanted but not installed.
    """

    def __init__(self, workdir: Path, active: bool = True, wandb_project: str = "", config: dict | None = None):
        self.workdir, self.active = workdir, active
        self.wandb = open_wandb(wandb_project, workdir, config or {}) if active and wandb_project else None
        if active:
            workdir.mkdir(parents=True, exist_ok=True)
            self.path = workdir / "metrics.jsonl"
            self.board = SummaryWriter(str(workdir / "tensorboard"))

    def resume(self, step: int) -> None:
        """Drops lines after `step` that a crashed run left behind, so that every step appears once; alarms stay."""
        if not self.active or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line the crash cut
                continue
            if entry["step"] <= step or "alarm" in entry:
                kept.append(line)
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """`values` at `step` (1-based count of finished steps)."""
        if self.active:
            self._append({"step": step} | {k: float(v) if math.isfinite(v) else None for k, v in values.items()})
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
            if self.wandb:
                self.wandb.log(values, step=step)

    def alarm(self, step: int, kind: str, message: str) -> None:
        """`{"step", "alarm", "message"}` to metrics.jsonl, and a text to TensorBoard."""
        if self.active:
            self._append({"step": step, "alarm": kind, "message": message})
            self.board.add_text(f"alarm/{kind}", message, step)
            self.board.flush()
            if self.wandb:
                self.wandb.alert(title=kind, text=message)

    def _append(self, entry: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """`image [h, w, 3]` uint8 to TensorBoard."""
        if self.active:
            self.board.add_image(name, image, step, dataformats="HWC")
            if self.wandb:
                self.wandb.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        if self.active:
            self.board.close()
            if self.wandb:
                self.wandb.finish()


def open_wandb(project: str, workdir: Path, config: dict):
    """The wandb module with a run of `project` open; the same run again for the same workdir.

    Raises:
      ConfigError: if wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        advice = "pip install wandb, or leave it empty"
        raise ConfigError(f"config.wandb_project={project!r}, but wandb is not installed: {advice}") from error
    name = re.sub(r"[^\w-]", "-", str(workdir.resolve()).strip("/"))[-60:]
    wandb.init(project=project, id=name, name=workdir.name, dir=str(workdir), config=config, resume="allow")
    return wandb


class ProgressReport:
    """A progress bar with step time and ETA on a terminal, plain lines elsewhere; silent when not `active`."""

    def __init__(self, total: int, start: int = 0, active: bool = True, label: str = "train"):
        self.total, self.active, self.label = total, active, label
        self.began, self.first = time.monotonic(), start
        self.bar = None
        if active and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"))
            self.task = self.bar.add_task(label, total=total, completed=start, note="compiling")
            self.bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; plain output waits for `note`."""
        if self.bar:
            self.bar.update(self.task, completed=step)
        if step == self.first + 1:  # the first step compiles: it says nothing about the others
            self.began = time.monotonic()

    def note(self, step: int, text: str) -> None:
        """Shows `text` (step time, losses) beside the bar, or prints it with step and ETA."""
        if self.bar:
            self.bar.update(self.task, note=text)
        elif self.active:
            done = max(step - self.first - 1, 1)
            left = (time.monotonic() - self.began) / done * (self.total - step)
            print(f"{self.label} {step}/{self.total}  eta {int(left) // 60}m{int(left) % 60:02d}s  {text}", flush=True)

    def print(self, text: str) -> None:
        """A line that stays."""
        if self.active:
            (self.bar.console.print if self.bar else print)(text)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


class ByteReport:
    """Progress in bytes: a bar on a terminal, a line every ten seconds elsewhere; silent when not `active`."""

    PAUSE = 10.0  # seconds between lines

    def __init__(self, total: int, active: bool = True, label: str = "read"):
        self.total, self.active, self.label, self.done = total, active, label, 0
        self.began = self.said = time.monotonic()
        self.bar = None
        if active and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn())
            self.task = self.bar.add_task(label, total=total)
            self.bar.start()

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=min(self.done, self.total))
        elif self.active and now - self.said > self.PAUSE:
            self.said = now
            left = int((now - self.began) / self.done * max(self.total - self.done, 0))
            print(
                f"{self.label} {self.done / 1e9:.1f}/{self.total / 1e9:.1f} GB  eta {left // 60}m{left % 60:02d}s",
                flush=True,
            )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
