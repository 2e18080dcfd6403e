"""Where numbers go: JSONL always, TensorBoard beside it, and one line or a progress bar for the person who waits."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricWriter:
    """Scalars and pictures of a run, written by process 0 only.

    `workdir/metrics.jsonl` gets one object per call of `scalars`; `workdir/tensorboard` the same plus the pictures.
    """

    def __init__(self, workdir: Path, active: bool = True):
        self.active = active
        if active:
            workdir.mkdir(parents=True, exist_ok=True)
            self.path = workdir / "metrics.jsonl"
            self.board = SummaryWriter(str(workdir / "tensorboard"))

    def resume(self, step: int) -> None:
        """Drops lines after `step` that a crashed run left behind, so that every step appears once."""
        if not self.active or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line the crash cut
                continue
            if entry["step"] <= step:
                kept.append(line)
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """`values` at `step` (1-based count of finished steps)."""
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **{k: float(v) for k, v in values.items()}}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """`image [h, w, 3]` uint8 to TensorBoard."""
        if self.active:
            self.board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self.active:
            self.board.close()


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
