"""The paper's tables: the list of runs; stages are stored, continued and never repeated."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.checkpoints.base import read_unet
from sfv_jax.checkpoints.run import WorkdirError
from sfv_jax.config import patch_codec_of, unet_of, world_of
from sfv_jax.config_check import check
from sfv_jax.config_records import settled
from sfv_jax.data.loader import world_source
from sfv_jax.data.video import write_video
from sfv_jax.errors import UserError
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.methods import METHODS
from sfv_jax.reproduction import experiments, jobs, tables
from sfv_jax.reproduction import rows as stages
from sfv_jax.reproduction import runs as trainings
from sfv_jax.reproduction.experiments import BASE, Row
from sfv_jax.reproduction.runs import Runs
from sfv_jax.runtime import commands
from sfv_jax.runtime.plain_config import flat
from sfv_jax.training.alarms import TrainingStopped
from sfv_jax.training.step import unet_step_flops
from tests.support import small_run
from tests.test_configs import get_config

ROWS = [Row("base, 1 step", BASE, published=2.0), Row("lcm, 2 steps", "animatelcm", 2, "animatelcm", published=1.0)]


def small_config(run: str, seed: int, base: str):
    """Returns a config of networks that compile quickly."""
    small = small_run.get_config()
    config = configs.tiny(configs.teacher() if run == BASE else configs.animatelcm())
    for section in ("data", "patch_codec", "unet"):
        config[section] = small[section]
    config.update(dict(steps=2, batch_size=4, log_every=1, checkpoint_every=1, sample_every=0, seed=seed))
    config.init = "" if run == BASE else base
    return config.lock()


def trained(config, workdir):
    """Writes the files of a training run that `reproduce` reads, in place of training."""
    (workdir / "checkpoints" / str(config.steps)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    name = "loss/denoising" if config.method == BASE else "loss/consistency"
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({"step": n, name: 1.0 / n}) + "\n" for n in (1, 2)))


class Made:
    """Stand-in for `Sampler`: a video depends on its steps, its image and its seed."""

    @classmethod
    def load(cls, path):
        assert (path / "checkpoints").is_dir()
        return cls()

    def __call__(self, images, *, seed=0, times=None, steps, sampler, guidance, noise_aug_strength):
        if times is not None:
            times |= {"denoise": 0.01 * steps, "decode": 0.02}
        seed = [seed] if times is not None else seed
        noise = [
            np.random.default_rng(n).integers(0, 9, (2, *image.shape)) for n, image in zip(seed, images, strict=True)
        ]
        return np.stack([(image // 2 + steps + x).astype(np.uint8) for image, x in zip(images, noise, strict=True)])


@pytest.fixture
def bench(tmp_path, monkeypatch) -> stages.Bench:
    """Bench of two rows in the smallest world; the score is the mean brightness."""
    monkeypatch.setitem(experiments.TABLES, "small", ("Small", ROWS))
    monkeypatch.setattr(trainings, "train", trained)
    monkeypatch.setattr(jobs, "Sampler", Made)
    base = tmp_path / "base"
    truth, _ = world_of(small_config(BASE, 0, "")).batch(range(4), "heldout")
    return stages.Bench(
        runs=Runs(tmp_path, lambda run, seed: small_config(run, seed, str(base)), base, True),
        truth=truth,
        images=list(truth[:, 0]),
        resize=lambda clip: clip,
        score=lambda clips: {"fvd": float(clips.mean()), "interval": (0.0, 1.0), "mean": 1.0},
        columns={"mean": "mean"},
        notes=[],
        options=dict(noise_aug_strength=0.0),
        load={},
        batch=3,
    )


def test_stages_are_kept_continued_and_never_repeated(bench, monkeypatch):
    calls, score = [], bench.score

    def scored(clips):
        calls.append(len(clips))
        if len(calls) == 2:
            raise KeyboardInterrupt  # in the middle: everything is trained and sampled, one row is scored
        return score(clips)

    object.__setattr__(bench, "score", scored)
    with pytest.raises(KeyboardInterrupt):
        jobs.reproduce(bench, ["small"], [0])
    assert not (bench.runs.folder / "scores.md").exists()

    def never(*_, **__):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "train", never)
        patch.setattr(stages, "sample_clips", lambda *_: stages.read_clips(_[4], bench, _[5]))
        jobs.reproduce(bench, ["small"], [0])
        table = (bench.runs.folder / "scores.md").read_text()
        assert calls == [4, 4, 4]
        jobs.reproduce(bench, ["small"], [0])
        assert calls == [4, 4, 4] and (bench.runs.folder / "scores.md").read_text() == table
    assert "| base, 1 step | 2 |" in table and "published: lcm, 2 steps < base, 1 step" in table
    page = (bench.runs.folder / "index.html").read_text()
    assert page.count("<video") == 4 * 3 and "Training: consistency" in page
    assert (bench.runs.folder / "strips.png").stat().st_size > 0
    load = partial(Made.load, bench.runs.base)
    # A row is made again if its model was trained differently, and a workdir of another config is rejected.
    _, first = stages.ensure_row(bench, ROWS[0], 0, load)
    _, second = stages.ensure_row(bench, ROWS[0], 1, load)
    assert calls == [4] * 4 and not np.array_equal(first, second)
    (bench.runs.base / "config.json").write_text(json.dumps(small_config(BASE, 1, "").to_dict()))
    stages.ensure_row(bench, ROWS[0], 0, load)
    assert calls == [4] * 5
    runs = dataclasses.replace(bench.runs, config=lambda run, seed: small_config(run, seed + 2, str(bench.runs.base)))
    with pytest.raises(WorkdirError, match="seed"):
        runs.ensure(BASE, 0)


def test_rows_by_a_tiny_decoder(bench, monkeypatch):
    """Each row of one step has another; one is made again when the decoder is another, and the others are not."""

    class Tiny(Made):
        def with_decoder(self, name):
            assert name == "own"
            return lambda images, **options: Made.__call__(self, images, **options) // 2

    loaded = []
    monkeypatch.setattr(Tiny, "load", classmethod(lambda cls, path: loaded.append(path) or cls()))
    monkeypatch.setattr(jobs, "Sampler", Tiny)
    jobs.reproduce(bench, ["small"], [0])
    assert len(loaded) == 2
    tiny = dataclasses.replace(bench, decoder="own", about_decoder={"sha256": "a"})
    report = jobs.reproduce(tiny, ["small"], [0])
    rows = report.record["rows"]
    assert [*rows] == ["teacher-1", "teacher-1-tiny_decoder", "animatelcm-2"] and len(loaded) == 3
    plain, [other] = rows["teacher-1"][0], rows["teacher-1-tiny_decoder"]
    assert other["decoder"] == {"sha256": "a"} and "decoder" not in plain
    assert other["fvd"] < 0.6 * plain["fvd"] and other["ms_decode"] == 20 and other["ms_whole"] > 0
    table = (bench.runs.folder / "scores.md").read_text()
    assert "| base, 1 step, tiny decoder |  |" in table and "ms decoding" in table
    jobs.reproduce(tiny, ["small"], [0])
    assert len(loaded) == 3
    jobs.reproduce(dataclasses.replace(tiny, about_decoder={"sha256": "b"}), ["small"], [0])
    assert len(loaded) == 4


def test_an_impossible_decoder_is_refused_before_videos_are_read(tmp_path):
    options = dict(scale="svd", svd="world-teacher", data="cache", real="none", decoder=str(tmp_path))
    request = jobs.Request(tmp_path, **options)
    with pytest.raises(UserError, match="is neither a tiny decoder's folder nor a run that trains one"):
        jobs.bench_for(request, jobs.runs_for(request))


def test_a_row_that_lacks_a_younger_score_is_scored_again(bench):
    bench.runs.ensure(BASE, 0)
    load = partial(Made.load, bench.runs.base)
    first, _ = stages.ensure_row(bench, ROWS[0], 0, load)
    path = bench.runs.folder / "seed0" / "rows" / ROWS[0].key / "row.json"
    for name in ("mean", "of another version"):
        path.write_text(json.dumps({k: v for k, v in first.items() if k != name} | {"fvd": -1.0}))
        found, _ = stages.ensure_row(bench, ROWS[0], 0, load)
        assert found["fvd"] == (first["fvd"] if name == "mean" else -1.0) and found["mean"] == 1.0


def test_rows_that_no_model_made(bench):
    """They are scored as the others, once, and anew if a score is younger."""
    calls, score = [], bench.score
    bench = dataclasses.replace(
        bench,
        references={"truth": bench.truth, "still image": np.repeat(bench.truth[:, :1], 2, axis=1)},
        score=lambda clips: calls.append(len(clips)) or score(clips),
    )
    jobs.reproduce(bench, ["small"], [0])
    lines = (bench.runs.folder / "scores.md").read_text().splitlines()
    (truth,) = (line.split("|") for line in lines if line.startswith("| truth |"))
    assert float(truth[3]) == pytest.approx(bench.truth.mean(), abs=0.1) and truth[-2].strip() == ""
    assert any(line.startswith("| still image |") for line in lines) and calls == [4] * 4
    jobs.reproduce(bench, ["small"], [0])
    assert calls == [4] * 4
    more = lambda clips: bench.score(clips) | {"new": 1.0}  # noqa: E731
    jobs.reproduce(dataclasses.replace(bench, columns={"new": "new"}, score=more), ["small"], [0])
    assert calls == [4] * 8


def test_the_scenes_of_the_package(tmp_path, monkeypatch):
    request = jobs.Request(tmp_path, scale="scenes", fast=True, decoder="tiny")
    runs = jobs.runs_for(request)
    assert runs.folder == tmp_path / "scenes-fast" and runs.config("ladd", 2).seed == 2 and not runs.trains_base
    bench = jobs.bench_for(request, runs)
    assert bench.truth.shape == (experiments.SCENES_FAST.conditions, 14, 32, 32, 3)
    assert [*bench.references] == ["truth", "still image"]
    assert "i3d_fvd" not in bench.columns.values() and len(bench.about_decoder["sha256"]) == 64
    assert bench.rows("table2")[1].label == "spatial and temporal, tiny decoder"
    # With I3D there is a further column.
    monkeypatch.setattr(jobs.kinetics, "installed", lambda: "there")
    features = SimpleNamespace(features=lambda clips: clips.reshape(len(clips), -1)[:, :5], about={"file": "i3d"})
    monkeypatch.setattr(jobs, "load_features", lambda _: features)
    monkeypatch.setattr(stages.world, "score", lambda *_, **__: {"world_fvd": 1.0, "world_fvd_interval": (0, 2)})
    bench = jobs.bench_for(dataclasses.replace(request, fast=False), runs)
    assert bench.columns["I3D FVD"] == "i3d_fvd" and len(bench.truth) == experiments.SCENES_FULL.conditions
    perfect, damaged = (bench.score(clips)["i3d_fvd"] for clips in (bench.truth, bench.truth // 2))
    assert abs(perfect) < 1e-6 < damaged


def test_several_seeds_give_a_mean_and_a_range():
    records = [{"fvd": v, "interval": (0, 9), "distance": 2 * v, "digest": "x"} for v in (1.0, 2.0, 6.0)]
    assert tables.summarise(records) == {"fvd": 3.0, "distance": 6.0, "interval": (1.0, 6.0)}
    assert tables.summarise(records[:1]) is records[0]


@pytest.mark.parametrize("run", experiments.RUNS)
def test_every_run_is_a_config_that_its_method_accepts(run):
    """This holds at both scales, and in the world all methods have the same budget."""
    recipe, changes = experiments.RUNS[run]
    config = experiments.svd_config(run, 3, "model", "cache")
    default = getattr(configs, recipe)()
    assert (config.init, config.data.path, config.seed, config.steps) == ("model", "cache", 3, 50_000)
    for field, value in changes.items():
        section, name = field.split(".")
        assert config[section][name] == value != default[section][name]
    world = experiments.world_config(run, experiments.FAST, 0, "base")
    steps = experiments.OWN_STEPS.get(run, experiments.FAST.steps)
    assert (world.steps, world.batch_size) == (steps, experiments.FAST.batch)
    for field, value in changes.items():
        section, name = field.split(".")
        assert world[section][name] == value
    scenes = experiments.scenes_config(run, experiments.SCENES_FAST, 3)
    check(scenes)
    assert (scenes.init, scenes.seed, scenes.batch_size) == ("world-teacher", 3, experiments.SCENES_FAST.batch)
    fields = flat(scenes.to_dict())
    assert all(fields[name] == value for name, value in changes.items())
    assert fields["steps"] == experiments.SCENES_FAST.steps
    if scenes.method == "sfv":
        recipes = {"no reconstruction": 0.0, "printed recipe": 0.0, "printed recipe x 20": 0.0, "default recipe": 1.5}
        assert scenes.sfv.balance == recipes.get(run, 6.0)
        assert scenes.sfv.noise_shift == (run not in experiments.RECIPES)
    every = {
        "sfv": 1 if run in experiments.RECIPES else 4,
        "ladd": 4,
        "ufogen": 1,
    }  # steps of the heads per generator's
    assert scenes.method == "animatelcm" or scenes[scenes.method].generator_every == every[scenes.method]
    assert (scenes.generator_optimizer.name == "sm3") == (run in experiments.RECIPES)
    METHODS[scenes.method].make_networks(read_unet("world-teacher"), scenes)
    codec, unet = patch_codec_of(world), unet_of(world)
    assert unet.out_channels == codec.latent_channels and world_of(world).size % codec.embed_cell == 0
    METHODS[world.method].make_networks(unet, world)


def test_sfv_of_the_scenes_tables_is_the_packages():
    """All but the length, and `noise_shift`, which the tables need for the paper's P_mean."""
    packaged = flat(get_config("world")("sfv").to_dict())
    table = flat(experiments.scenes_config("sfv", experiments.SCENES_FULL, 0).to_dict())
    different = {name for name in packaged if packaged[name] != table.get(name)}
    assert different == {"sfv.noise_shift", "log_every", "checkpoint_every", "sample_every"}


def test_tables_name_runs_that_exist():
    rows = [row for _, rows in experiments.TABLES.values() for row in rows]
    assert {row.run for row in rows} <= {BASE, *experiments.RUNS}
    kinds = {row.key: (row.run, row.steps, row.sampler, row.guidance) for row in rows}
    assert len(kinds) == len({*kinds.values()})  # a key stands for one way of sampling one model
    assert set(experiments.runs_of(["table2"])) == {"sfv", "spatial heads", "temporal heads"}


@pytest.mark.slow
def test_the_plan_counts_steps_and_flops(tmp_path):
    def config(run, seed):
        return small_config(BASE if run == BASE else "animatelcm", seed, "")

    runs = Runs(tmp_path, config, tmp_path / "base", True)
    lines = "\n".join(trainings.plan(runs, ["table1"], [0, 1]))
    assert "teacher: 2 steps of 4" in lines and "9 training runs (2 seeds)," in lines
    for run in (BASE, *experiments.runs_of(["table1"])):
        (runs.workdir(run, 0) / "checkpoints/2").mkdir(parents=True)
    assert trainings.plan(runs, ["table1"], [0]) == ["All 5 training runs are there."]
    lines = "\n".join(trainings.plan(runs, ["table1"], [0, 1]))
    assert "teacher" not in lines and "4 training runs (2 seeds), 5 are there" in lines
    one, two = (trainings.cost_of_step(config(run, 0), tmp_path) for run in (BASE, "animatelcm"))
    for run in (BASE, "animatelcm", "sfv"):
        small = configs.tiny(configs.sfv()) if run == "sfv" else small_config(run, 0, "")
        if run == "sfv":
            small.update({name: small_config(BASE, 0, "")[name].to_dict() for name in ("data", "patch_codec", "unet")})
        example = world_source(world_of(small), "train", 1, patch_codec_of(small))[0]
        exact = unet_step_flops(settled(small, "cpu"), unet_of(small), example)
        assert 0.9 < trainings.cost_of_step(small, tmp_path) / exact < 1.1, run
    assert one > 1e6 and 1.5 * one < two < 2.5 * one  # student (3 passes), guided teacher (2) and target (1)


def test_real_videos_are_scored_by_the_protocol_of_evaluate(tmp_path, monkeypatch, capsys):
    """Conditions keep their size, clips are scored at 320 x 240, and the score detects damaged clips."""
    frames = np.random.default_rng(0).integers(0, 256, (21, 14, 6, 8, 3), np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    for n, clip in enumerate(frames):
        write_video(tmp_path / "real" / f"{n:02d}.mp4", clip, fps=7)
    write_video(tmp_path / "real/short.mp4", frames[0, :9], fps=7)
    (tmp_path / "real/odd\n.mp4").write_bytes(b"no video")
    features = lambda clips: clips.reshape(len(clips), -1, 3).mean(axis=1)  # noqa: E731
    about = {"file": "i3d.pt", "sha256": 64 * "0"}
    asked = {"batch_norm_eps": 1e-5, "allow_torchscript": True}
    monkeypatch.setattr(stages.fvd, "load_i3d", lambda path, **options: (features, about) if options == asked else None)
    svd = SimpleNamespace(num_frames=14)
    monkeypatch.setattr(stages, "read_model", lambda path: SimpleNamespace(config=lambda part: svd))
    runs = trainings.svd_runs(tmp_path, "svd", "data", [])
    (tmp_path / "few").mkdir()
    (tmp_path / "few/0.mp4").touch()
    with pytest.raises(trainings.ReproduceError, match="few: 1 clips, FVD needs 20 or more"):
        stages.svd_bench(runs, str(tmp_path / "few"), "i3d.pt", loading=asked)
    bench = stages.svd_bench(runs, str(tmp_path / "real"), "i3d.pt", loading=asked)
    assert bench.truth.shape == (21, 14, 240, 320, 3) and {x.shape for x in bench.images} == {(48, 64, 3)}
    protocol = Protocol()
    np.testing.assert_array_equal(
        bench.resize(bench.truth[0].repeat(2, axis=1)), protocol.score(bench.truth[0].repeat(2, axis=1))
    )
    assert abs(bench.score(bench.truth)["fvd"]) < 1e-6 < bench.score(bench.truth // 2)["fvd"]
    skipped = [f"{tmp_path}/real/odd\\n.mp4: cannot read the video: ", f"{tmp_path}/real/short.mp4: too short: 9 of 14"]
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"skipped {x}") for line, x in zip(lines, skipped, strict=True)] == [True, True]
    assert total == f"--real={tmp_path / 'real'}: 21 clips of 14 frames, 2 skipped"
    assert [f"skipped {line}" for line in bench.skipped] == lines and len(bench.notes) == 1
    monkeypatch.setattr(stages, "MIN_SAMPLES", 22)
    with pytest.raises(trainings.ReproduceError, match="21 clips of 14 frames, 2 skipped; FVD needs 22 or more"):
        stages.svd_bench(runs, str(tmp_path / "real"), "i3d.pt", loading=asked)
    assert '"filter": "bilinear"' in bench.notes[0] and bench.options == dict(height=576, width=1024)


def test_settings_of_every_run():
    make = partial(experiments.svd_config, model="model", cache="cache")
    changes = ["mesh.fsdp=8", "steps=100", "dtype=float32", "ema_decay=0"]
    config = trainings.with_settings(make, changes)("spatial heads", 1)
    assert (config.mesh.fsdp, config.steps, config.dtype, config.ema_decay) == (8, 100, "float32", 0.0)
    assert config.seed == 1 and not config.discriminator.temporal
    for setting, message in [
        ("mesh.fdsp=8", "--set mesh.fdsp=8: the config of sfv has no field 'mesh.fdsp'"),
        ("steps=many", "--set steps=many: "),
        ("steps=1.5", "--set steps=1.5: "),
        ("steps", "--set steps: "),
        ("seed=-1", "config.seed=-1: give a whole number from 0 to 4294967295"),
        ("seed=4294967296", "config.seed=4294967296: give a whole number"),
        ("sfv.recon_c=-1", "config.sfv.recon_c=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            trainings.with_settings(make, [setting])("sfv", 0)


def test_runs_side_by_side(tmp_path, monkeypatch):
    """Each process gets its share of runs; if one fails, the command stops with the last line of its log."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *bad*1/2) echo it broke; exit 1; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(program))
    jobs.side_by_side(["--fast"], tmp_path, 2)
    said = [(tmp_path / f"job{n}.log").read_text() for n in (0, 1)]
    assert said == [f"-m sfv_jax.reproduce --fast --share={n}/2\n" for n in (0, 1)]
    with pytest.raises(TrainingStopped, match=r"job1.log: \['it broke'\]; the same command continues"):
        jobs.side_by_side(["--bad"], tmp_path, 2)


def test_shares_cover_all_rows(bench, monkeypatch, tmp_path):
    """The first share trains the base model, without which the others cannot start."""
    made = []
    monkeypatch.setattr(jobs, "runs_for", lambda request: bench.runs)
    monkeypatch.setattr(jobs, "bench_for", lambda request, runs: bench)
    monkeypatch.setattr(jobs, "ensure_run", lambda bench, run, tables, seed: made.append((run, seed)))

    def run(share: str) -> None:
        jobs.run(jobs.Request(tmp_path, only=("small",), seeds=(0, 1), share=commands.share(share)))

    with pytest.raises(trainings.ReproduceError, match="--share=1/2: .* is not trained yet; --share=0/2 does it first"):
        run("1/2")
    run("0/2")
    assert bench.runs.done(BASE, 0) and made == [("animatelcm", 0), (BASE, 0)]
    run("1/2")
    assert made[2:] == [("animatelcm", 1), (BASE, 1)]


def test_impossible_requests(tmp_path):
    for share in ("2", "1/0", "a/2"):
        with pytest.raises(UserError, match=f"--share={share}: write K/N"):
            commands.share(share)
    assert commands.share(None) is None
    with pytest.raises(trainings.ReproduceError, match="--only=table9: choose from table1"):
        jobs.Request(tmp_path, only=("table1", "table9"))
    with pytest.raises(trainings.ReproduceError, match="--scale svd needs --svd MODEL and --data CACHE"):
        jobs.run(jobs.Request(tmp_path, scale="svd", svd="model"))
    request = jobs.Request(tmp_path, scale="svd", svd="model", data="cache")
    with pytest.raises(trainings.ReproduceError, match="--scale svd needs --real"):
        jobs.bench_for(request, jobs.runs_for(request))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", bytes(3000), b"of another digest", None], ids=repr)
def test_damaged_samples_are_made_again(bench, content):
    load = partial(Made.load, bench.runs.base)
    trained(bench.runs.config(BASE, 0), bench.runs.base)
    record, clips = stages.ensure_row(bench, ROWS[0], 0, load)
    second = bench.runs.folder / "seed0/rows" / ROWS[0].key / "000003.npz"
    if content == b"of another digest":
        np.savez(second, clips=clips[3:] // 2, digest="x")
    elif content is None:
        second.unlink()
    else:
        second.write_bytes(content)
    again, same = stages.ensure_row(bench, ROWS[0], 0, load)
    assert np.array_equal(clips, same) and again["fvd"] == record["fvd"]


def test_skipped_clips_are_in_the_report(bench):
    object.__setattr__(bench, "skipped", ["a.mp4: too short", "b|.mp4: no video"])
    jobs.reproduce(bench, ["small"], [0])
    text = (bench.runs.folder / "scores.md").read_text()
    assert "2 real clips could not be read" in text and "- a.mp4: too short" in text and r"- b\|.mp4" in text
    assert json.loads((bench.runs.folder / "scores.json").read_text())["skipped"] == bench.skipped
    assert "2 real clips could not be read" in (bench.runs.folder / "index.html").read_text()


def test_seeds_of_samples_are_those_of_jax(bench):
    """Those of training go up to 2^32 - 1; those of the samples, a million times as large, keep their lowest bits."""
    seeds = []

    class Recorded(Made):
        def __call__(self, images, *, seed=0, **options):
            seeds.append(seed)
            return super().__call__(images, seed=seed, **options)

    trained(bench.runs.config(BASE, 0), bench.runs.base)
    stages.ensure_row(bench, ROWS[0], 2**32 - 1, Recorded)
    assert seeds[:2] == [[2**32 - 1_000_000, 2**32 - 999_999, 2**32 - 999_998], [2**32 - 999_997]]
