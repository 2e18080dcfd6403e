"""Writer of metrics and pictures: JSONL, TensorBoard and, if configured, Weights & Biases."""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

from sfv_jax.config import ConfigError
from sfv_jax.runtime.files import free_name, write_text


class MetricWriter:
    """Writer of the scalars and pictures of a run.

    `workdir/metrics.jsonl` receives one object per call of `scalars` (null for a number that is not finite) and per
    alarm. `workdir/tensorboard` and the Weights & Biases project receive the same and the pictures.

    Args:
      workdir: the workdir of the run.
      active: whether to write anything; True in process 0 only.
      wandb_project: project of Weights & Biases; "" for none.
      config: config of the run, for Weights & Biases.

    Raises:
      ConfigError: if `wandb_project` is given and wandb is not installed.
    """

    def __init__(self, workdir: Path, active: bool = True, wandb_project: str = "", config: dict | None = None):
        self.workdir, self.active = workdir, active
        self.wandb = open_wandb(wandb_project, workdir, config or {}) if active and wandb_project else None
        if active:
            workdir.mkdir(parents=True, exist_ok=True)
            self.path = workdir / "metrics.jsonl"
            self.board = summary_writer(workdir / "tensorboard")

    def resume(self, step: int) -> None:
        """Removes lines after `step`, left by a crashed run, so that every step appears once; alarms remain.

        A last line that a crash cut off is removed, too. If other lines are unreadable, the file is kept under another
        name and its good lines go on.
        """
        if not self.active or not os.path.lexists(self.path):
            return
        lines, broken = read_metrics(self.path)
        if broken:
            aside = free_name(self.path.with_name(f"{self.path.name}.damaged"))
            self.path.replace(aside)
            print(f"{self.path}: {broken}; kept as {aside.name}, its good lines go on", file=sys.stderr)
        kept = [json.dumps(entry) for entry in lines if entry["step"] <= step or "alarm" in entry]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes `values` at `step`, the number of finished steps."""
        if self.active:
            self._append({"step": step} | {k: float(v) if math.isfinite(v) else None for k, v in values.items()})
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
            if self.wandb:
                self.wandb.log(values, step=step)

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Writes `{"step", "alarm", "message"}` to metrics.jsonl, and a text to TensorBoard."""
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
        """Writes `image`, uint8 `[h, w, 3]`, to TensorBoard."""
        if self.active:
            self.board.add_image(name, image, step, dataformats="HWC")
            if self.wandb:
                self.wandb.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Ends the TensorBoard file and the run of Weights & Biases."""
        if self.active:
            self.board.close()
            if self.wandb:
                self.wandb.finish()


def read_metrics(path: Path) -> tuple[list[dict], str]:
    """Reads `metrics.jsonl`.

    Args:
      path: the file.

    Returns:
      entries: the good lines: objects with a whole number "step".
      broken: what is wrong with the other lines, "" if there are none but a cut-off last one.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    entries, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # also of text that is not UTF-8
            entry = None
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
        elif number < len(lines):  # a whole line ends in "\n"
            bad.append(number)
    return entries, f"{len(bad)} lines are not metrics, first line {bad[0]}" if bad else ""


def summary_writer(folder: Path):
    """Returns tensorboardX's `SummaryWriter` of `folder`.

    Where torch is installed, tensorboardX imports it for a type annotation, which takes as long as all other imports of
    a run. So torch counts as absent for that import, unless it is loaded anyway.
    """
    if "torch" in sys.modules:
        from tensorboardX import SummaryWriter
    else:
        sys.modules["torch"] = None  # pyrefly: ignore[unsupported-operation]  # an import of it raises ImportError
        try:
            from tensorboardX import SummaryWriter
        finally:
            del sys.modules["torch"]
    return SummaryWriter(str(folder))


def open_wandb(project: str, workdir: Path, config: dict):
    """Opens a run of a Weights & Biases project, always the same one for a workdir, and returns the wandb module.

    Raises:
      ConfigError: if wandb is not installed.
    """
    try:
        import wandb  # pyrefly: ignore[missing-import]  # optional
    except ImportError as error:
        advice = "pip install wandb, or leave it empty"
        raise ConfigError(f"config.wandb_project={project!r}, but wandb is not installed: {advice}") from error
    name = re.sub(r"[^\w-]", "-", str(workdir.resolve()).strip("/"))[-60:]
    wandb.init(project=project, id=name, name=workdir.name, dir=str(workdir), config=config, resume="allow")
    return wandb
