"""Measurement of a new accelerator in a few minutes, run by `launch/accelerator_check.sh`.

    python -m sfv_jax.performance.accelerator_check --out DIR [--minutes 8] [--tiny]

Stages run one after the other in the order of their value, each in a process of its own with a time limit: device,
parity, sampling, diffusers, train, extras. While the first two run, the programs of later stages are compiled ahead in
parallel processes, into the folder `DIR/compiled`. A stage writes `DIR/STAGE.json` after each figure, and
after each stage `DIR/results.json` and `DIR/results.md` hold all that is known, so a cut loses nothing. A stage that
fails, hangs or runs out of memory does not touch the results of the others.

It needs jax, flax, optax, orbax, einops, numpy and, for the parity stage, the repository's `tests` folder; the stage
`diffusers` also torch and diffusers.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from absl import flags

from sfv_jax.errors import UserError
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import replacing, write_json
from sfv_jax.runtime.platforms import end_group

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[2]
LIMITS = {  # seconds of each stage, in the order of value
    "device": 60.0,
    "parity": 100.0,
    "sampling": 150.0,
    "diffusers": 150.0,
    "train": 150.0,
    "extras": 120.0,
}
LEAST = 10.0  # seconds below which a stage is not started
AHEAD = {"device": "train", "parity": "sampling"}  # {stage: later stage whose programs are compiled meanwhile}


@dataclass
class Outcome:
    """End of a stage: its status ("done", "failed", "cut" or "skipped"), its seconds, and the reason."""

    status: str
    seconds: float = 0.0
    reason: str = ""


def run(out: Path, minutes: float, tiny: bool, only: list[str] | None = None) -> dict[str, Outcome]:
    """Runs the stages within `minutes` and returns how each ended; the figures are in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in only or LIMITS:  # figures of an earlier run
        (out / f"{name}.json").unlink(missing_ok=True)
    compiled = out / "compiled"
    compiled.mkdir(exist_ok=True)
    for path in (*compiled.glob("*.pickle"), *compiled.glob("*.json")):  # of another size, perhaps
        path.unlink()
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    ahead: list[subprocess.Popen] = []
    for name, limit in LIMITS.items():
        limit *= 2 if tiny else 1  # CPUs compile slowly
        if only and name not in only:
            continue
        later = AHEAD.get(
            name
        )  # nothing is timed meanwhile but the device's limits; tracing the train step takes longer
        if later and (not only or later in only):
            ahead.append(_start(out, later, tiny, ahead=True))
        left = deadline - time.monotonic()
        if left < LEAST:
            outcomes[name] = Outcome("skipped", reason="no time left")
        else:
            while ahead and name not in AHEAD:  # what is compiled so far can be loaded
                _end(ahead.pop(), max(min(left / 3, 60.0), 1.0))
            outcomes[name] = _finish(_start(out, name, tiny), out / f"{name}.log", min(limit, left))
        print(f"{name}: {outcomes[name].status} {outcomes[name].reason}", flush=True)
        write_results(out, outcomes, f"launch/accelerator_check.sh --minutes={minutes:g}{' --tiny' * tiny}")
    for process in ahead:
        _end(process, 0.0)
    return outcomes


def stage_command(out: Path, stage: str, tiny: bool, ahead: bool) -> list[str]:
    """Returns the command of a stage's process."""
    module = "sfv_jax.performance.accelerator_stages"
    return [sys.executable, "-m", module, f"--stage={stage}", f"--out={out}", f"--tiny={tiny}", f"--ahead={ahead}"]


def _start(out: Path, stage: str, tiny: bool, ahead: bool = False) -> subprocess.Popen:
    """Starts the process of a stage, or of its compilation `ahead`, in a group of its own, with a log in `out`."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(out.resolve() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if tiny:  # a rehearsal compiles soon and runs slowly
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    with (out / f"{'ahead-' * ahead}{stage}.log").open("w") as log:
        return subprocess.Popen(
            stage_command(out, stage, tiny, ahead),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )


def _finish(process: subprocess.Popen, log: Path, limit: float) -> Outcome:
    """Waits for a stage up to `limit` seconds, then ends it and all that it started."""
    began = time.monotonic()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        _end(process, 0.0)
        return Outcome("cut", time.monotonic() - began, f"after {limit:.0f} s")
    seconds = time.monotonic() - began
    if code == 0:
        return Outcome("done", seconds)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome("failed", seconds, f"exit code {code}: {lines[-1][:300] if lines else 'nothing printed'}")


def _end(process: subprocess.Popen, patience: float) -> None:
    """Waits `patience` seconds for a process, then kills its group."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        end_group(process)
        process.wait()


def write_results(out: Path, outcomes: dict[str, Outcome], command: str) -> None:
    """Writes `results.json` and `results.md`: how each stage ended, and the figures there are."""
    figures = {}
    for name in outcomes:
        path = out / f"{name}.json"
        figures[name] = json.loads(path.read_text()) if path.is_file() else {}
    stages = {name: asdict(outcome) for name, outcome in outcomes.items()}
    write_json(out / "results.json", {"command": command, "stages": stages, "figures": figures})
    note = ": tiny networks on small frames, a rehearsal" if "--tiny" in command else ""
    with replacing(out / "results.md") as temporary:
        temporary.write_text(f"`{command}`{note}\n\n{markdown(stages, figures)}\n")


# Label, place in the results, goal or anchor.
ROWS = (
    ("UNet, one call, 14 x 576 x 1024, bf16", ("sampling", "denoise"), "goal: at most 95 on an H200"),
    ("UNet with guidance", ("sampling", "denoise, guided"), "SF-V's paper: 300 per call on an A100"),
    ("VAE decoder, 14 frames", ("sampling", "decode"), ""),
    ("tiny decoder, 14 frames", ("extras", "decode, tiny decoder"), "goal: at most an eighth of the VAE decoder"),
    ("CLIP", ("sampling", "clip"), ""),
    ("VAE encoder, one image", ("sampling", "encode"), ""),
    ("image to frames, one step", ("sampling", "image to frames"), "goal: at most 400 on an H200"),
    ("SF-V train step, 448 x 768, batch 1", ("train", "train step"), "goal: at least 45 % MFU within 80 GB"),
    ("UNet, 25 frames", ("extras", "denoise, 25 frames"), ""),
    ("UNet, batch 2", ("extras", "denoise, batch 2"), ""),
)


def markdown(stages: dict, figures: dict) -> str:
    """Returns the tables of `docs/benchmarks.md`; a figure that is missing is a dash."""
    about = figures.get("device", {})
    around = about.get("surroundings", {})
    lines = [
        f"{around.get('device', 'unknown device')}, {around.get('date', 'no date')}, jax {around.get('jax', '?')}."
    ]
    limit = about.get("matmul_flops_bfloat16")
    if limit:
        copies = about.get("copy_bytes_per_second", 0) / 1e9
        lines.append(f"Matrix products: {limit / 1e12:.3g} TFLOP/s in bf16. Copies: {copies:.3g} GB/s.")
    lines += ["", "| figure | median ms (least to most) | TFLOP/s | MFU | plan's bound, ms | goal or anchor |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for label, (stage, name), anchor in ROWS:
        found = figures.get(stage, {}).get(name)
        if not found:
            lines.append(f"| {label} | - | - | - | - | {anchor} |")
            continue
        low, middle, high = (1e3 * f(found["seconds"]) for f in (min, statistics.median, max))
        rate = f"{found['tflops']:.3g}" if found.get("tflops") else "-"
        share = f"{found['mfu']:.0%}" if found.get("mfu") else "-"
        bound = f"{1e3 * found['plan']['roofline_seconds']:.1f}" if found.get("plan") else "-"
        lines.append(f"| {label} | {middle:.1f} ({low:.1f} to {high:.1f}) | {rate} | {share} | {bound} | {anchor} |")
    for stage, times in figures.get("diffusers", {}).items():
        ours = statistics.median(times["sfv_jax"])
        for peer in ("diffusers", "torch.compile"):
            if peer in times:
                ratio = statistics.median(times[peer]) / ours
                goal = "goal: at least 1.3 times" if peer == "torch.compile" else ""
                lines.append(f"| {stage}: {peer} over ours | {ratio:.2f} times | - | - | - | {goal} |")
    lines += ["", "| stage | ended | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {name} | {s['status']} | {s['seconds']:.0f} | {s['reason']} |" for name, s in stages.items()]
    return "\n".join(lines)


def main() -> int:
    unknown = [name for name in FLAGS.only or [] if name not in LIMITS]
    if unknown:
        raise UserError(f"--only={','.join(unknown)}: choose from {', '.join(LIMITS)}")
    out = Path(FLAGS.out)
    outcomes = run(out, FLAGS.minutes, FLAGS.tiny, FLAGS.only)
    print("\n" + (out / "results.md").read_text())
    return 0 if all(outcome.status == "done" for outcome in outcomes.values()) else 1


def define_flags() -> None:
    flags.DEFINE_string("out", None, "folder for the results", required=True)
    flags.DEFINE_float("minutes", 8.0, "time for everything", lower_bound=0.1)
    flags.DEFINE_bool("tiny", False, "tiny networks: a rehearsal on a CPU")
    flags.DEFINE_list("only", None, f"stages to run: {', '.join(LIMITS)}; default: all")


if __name__ == "__main__":
    commands.run(main, define_flags)
