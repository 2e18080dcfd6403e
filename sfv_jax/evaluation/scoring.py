"""The three ways to score: a folder by itself, a folder against a folder, a checkpoint against real first frames."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sfv_jax.data.video import VideoError
from sfv_jax.data.worlds import World
from sfv_jax.evaluation import no_reference
from sfv_jax.evaluation import world as exact
from sfv_jax.evaluation.clips import Clip, Reading, condition_images, find_clips
from sfv_jax.evaluation.features import FILES, Set, compute_kept, features_of, label
from sfv_jax.evaluation.frechet import measure
from sfv_jax.evaluation.generation import generate, read_strip
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import Report


@dataclass(frozen=True)
class Extras:
    """What is optional: `embed` for CLIP similarity (None: none), `flow`, and the number of clips `shown`."""

    embed: Callable | None = None
    flow: bool = True
    shown: int = 9


def folder_alone(videos: Path, reading: Reading, images: Path | None, extras: Extras) -> Report:
    """Scores of each clip under `videos` by itself; `images` holds the conditions, None stands for first frames.

    Raises:
      VideoError: if no clip can be read, or a condition is missing.
    """
    clips = find_clips(videos)
    names = sorted({clip.name for clip in clips})
    found = condition_images(images, set(names)) if images else None
    results = no_reference.score_clips(
        reading.frames(clips),
        images=found and found.__getitem__,
        embed=extras.embed,
        flow=extras.flow,
        shown=names[: extras.shown],
        total=len(clips),
    )
    if not results.rows:
        reasons = "".join(f"\n  {line}" for line in reading.unreadable[:10])
        raise VideoError(f"none of the {len(clips)} clips in {videos} can be read:{reasons}")
    report = Report(f"Scores of {videos.name}")
    source = f"images of the same names in {images.name}" if images else "the first frame of each clip"
    no_reference.add_to(report, results, reading, source)
    return report


def folder_against_folder(
    videos: Path,
    reference: Path,
    protocol: Protocol,
    features: Callable,
    about: dict,
    *,
    kept: Path | None = None,
    shown: int = 9,
) -> Report:
    """Frechet distance of each group under `videos` to all clips under `reference`.

    All sets are cut to one size: `protocol.n`, or, if that is 0, the smallest set's.

    Raises:
      VideoError: if a set has fewer usable clips than asked, or than 20.
    """
    clips = find_clips(videos)
    groups = sorted({clip.group for clip in clips})
    real = features_of(find_clips(reference), protocol, features, about, kept=kept, of=str(reference))
    sets = {
        group or "all": features_of(
            [clip for clip in clips if clip.group == group],
            protocol,
            features,
            about,
            of=str(videos / group),
            prepare=protocol.score,  # cropping is for real clips; generated ones have their shape already
        )
        for group in groups
    }
    n = min(len(found.names) for found in [real, *sets.values()])
    report = Report(f"{videos.name} against {reference.name}")
    add_distances(report, sets, real, replace(protocol, n=n), about)
    wanted = sorted({clip.name for clip in clips})[:shown]
    pictures = {name: {} for name in wanted}
    for clip, frames in Reading(protocol.num_frames, protocol.fps).frames([c for c in clips if c.name in wanted]):
        pictures[clip.name].setdefault(clip.group or "all", protocol.score(frames))
    if wanted:
        report.clips("Some of the clips, as scored", pictures, protocol.fps)
    return report


def checkpoint_on_videos(
    sampler: Callable,
    clips: list[Clip],
    out: Path,
    protocol: Protocol,
    features: Callable,
    about: dict,
    *,
    dataset: str,
    source: dict,
    options: dict,
    origin: dict,
    kept: Path | None = None,
    batch_size: int = 1,
    extras: Extras,
) -> Report:
    """Generates from the first frames of real clips and measures the Frechet distance to those clips.

    Args:
      dataset, source: what the clips are (name and split) and what they are read from, for the record.
      options, origin: of `generation.generate`. Clips are kept in `out / "generated"`, and their features beside them.
    """
    real = features_of(clips, protocol, features, about, source=source, kept=kept, of=dataset)
    protocol = replace(protocol, n=len(real.names))
    by_name = {label(clip): clip for clip in clips}

    def first(n: int) -> np.ndarray:
        return by_name[real.names[n]].read(num_frames=1)[0]

    folder = out / "generated"
    how = dict(options=options, origin=origin | {"dataset": dataset, "source": source}, batch_size=batch_size)
    files = generate(sampler, real.names, first, folder, protocol, **how)
    read = lambda file: read_strip(file, protocol.num_frames)  # noqa: E731
    fake = Set(compute_kept(features, files, read, about, folder / "features.npz"), real.names, [])
    report = Report(f"{origin['checkpoint']} on {dataset}")
    add_distances(report, {"generated": fake}, real, protocol, about, source)
    order = sorted(range(len(files)), key=lambda k: real.names[k])
    place = {real.names[k]: k for k in order}
    shown = [real.names[k] for k in order[: extras.shown]]

    def generated():
        for k in order:
            yield Clip(files[k], "generated", real.names[k], None), read_strip(files[k], protocol.num_frames)

    results = no_reference.score_clips(
        generated(),
        images=lambda name: protocol.real(first(place[name])[None])[0],
        embed=extras.embed,
        flow=extras.flow,
        shown=shown,
        total=len(files),
    )
    for name in shown:
        frames = by_name[name].read(protocol.num_frames, protocol.fps)
        results.shown[name] = {"real": protocol.real(frames)} | results.shown[name]
    no_reference.add_to(report, results, Reading(protocol.num_frames, protocol.fps), "the first frame of the real clip")
    report.record |= {"dataset": dataset, "source": source, "options": options, "origin": origin}
    return report


def add_distances(
    report: Report, sets: dict[str, Set], real: Set, protocol: Protocol, about: dict, source: dict = FILES
) -> None:
    """Measures `sets` against `real` at n = `protocol.n` and adds the table and all that made it to `report`."""
    n = protocol.n
    found = {
        name: measure(real.features[:n], some.features[:n], ddof=protocol.ddof, seed=protocol.seed)
        for name, some in sets.items()
    }
    rows = [[name, x.value, x.extrapolated, "{:.4g} to {:.4g}".format(*x.interval), x.n] for name, x in found.items()]
    kind = "Frechet distance" if about["kind"] == "function" else "FVD"
    columns = ["", kind, "N to infinity", "95 % interval", "N"]
    report.table("Distance to the reference", columns, rows, footer(protocol, about, sets, real, source))
    dropped = {name: some.dropped for name, some in {"reference": real, **sets}.items() if some.dropped}
    for name, lines in dropped.items():
        report.text(f"{name}: {len(lines)} clips were dropped", lines)
    report.record |= {
        "protocol": asdict(protocol),
        "features": about,
        "distances": {name: asdict(x) for name, x in found.items()},
        "clips_used": {name: some.names[:n] for name, some in {"reference": real, **sets}.items()},
        "dropped": dropped,
    }


def footer(protocol: Protocol, about: dict, sets: dict[str, Set], real: Set, source: dict) -> list[str]:
    """What made a distance, in words: every field of the protocol, the features, what was left out."""
    fields, made, read = (", ".join(f"{k} {v}" for k, v in x.items()) for x in (asdict(protocol), about, source))
    all_sets = {"reference": real, **sets}
    counts = ", ".join(f"{name} {len(x.names)} (and {len(x.dropped)} dropped)" for name, x in all_sets.items())
    notes = [
        f"Protocol: {fields}.",
        f"Real clips: {read}.",
        f"Features: {made}.",
        f"Usable clips: {counts}; {protocol.n} of each used.",
        "Distances compare at equal N and equal features only. The interval is a bootstrap over clips.",
    ]
    width = real.features.shape[1]
    if protocol.n < width:
        few = f"{protocol.n} clips are fewer than {width} features"
        notes.append(f"{few}: most of the distance is bias, and N to infinity a guess.")
    return notes


def checkpoint_on_world(
    sampler: Callable,
    world: World,
    out: Path,
    *,
    n: int,
    seed: int = 0,
    network: Path | None = None,
    options: dict,
    origin: dict,
    batch_size: int = 16,
    shown: int = 9,
) -> Report:
    """Generates from `n` held-out first frames of the world and scores them exactly; see `evaluation.world`."""
    true, labels = world.batch(range(n), "heldout")
    size = {name: world.size for name in ("height", "width", "score_height", "score_width")}
    protocol = Protocol(n=n, seed=seed, num_frames=world.num_frames, **size)
    names = [f"{k:05d}" for k in range(n)]
    how = dict(options=options, origin=origin | {"world": asdict(world)}, batch_size=batch_size)
    files = generate(sampler, names, lambda k: true[k, 0], out / "generated", protocol, **how)
    clips = np.stack([read_strip(file, world.num_frames) for file in files])
    still = np.repeat(true[:, :1], world.num_frames, axis=1)
    sets = {"generated": clips, "truth": true, "still image": still}
    found = {name: exact.score(world, labels, x, network=network, seed=seed) for name, x in sets.items()}
    report = Report(f"{origin['checkpoint']} on its world")
    spread = {k: x.get("world_fvd_interval") for k, x in found.items()}
    rows = [
        [name, *(scores[key] for key in exact.MEANINGS), spread[name] and "{:.3g} to {:.3g}".format(*spread[name])]
        for name, scores in found.items()
    ]
    columns = ["", *(name.replace("_", " ") for name in exact.MEANINGS), "95 % interval"]
    notes = [
        f"{n} held-out first frames, seeds from {seed}.",
        *(f"{k.replace('_', ' ')}: {v}." for k, v in exact.MEANINGS.items()),
    ]
    if "network" in found["truth"]:
        about = found["truth"]["network"]
        accuracy = ", ".join(f"{k} {v:.3f}" for k, v in about["accuracy"].items())
        notes.append(f"Network of world fvd: accuracy {accuracy}; SHA-256 {about['sha256']}.")
    report.table("Exact scores", columns, rows, notes)
    report.clips("Side by side", {names[k]: {g: x[k] for g, x in sets.items()} for k in range(min(shown, n))}, 4)
    report.record |= {"scores": found, "options": options, "origin": origin, "protocol": asdict(protocol)}
    return report
