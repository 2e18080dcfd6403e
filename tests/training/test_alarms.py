"""Alarms on artificial metrics, the journal between device and disk, and the cost of a step."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.config import ConfigError
from sfv_jax.models.layers import conv2d
from sfv_jax.runtime import device
from sfv_jax.runtime.progress import ProgressReport
from sfv_jax.training import clock
from sfv_jax.training.alarms import Alarms, TrainingStopped, not_finite
from sfv_jax.training.clock import Clock, Trace
from sfv_jax.training.journal import Journal, line, summary
from sfv_jax.training.metrics import MetricWriter

HEALTHY = {
    "loss/hinge": 1.5,
    "live/spatial_0": 0.8,
    "live/temporal_0": 0.6,
    "gap/spatial_0": 0.5,
    "motion/ratio": 0.7,
    "time/step": 1.0,
    "time/data_wait": 0.1,
    "time/device": 0.8,
}
BAD = {
    "discriminator": [
        {"live/spatial_0": 0.01, "live/temporal_0": 0.0},
        {"gap/spatial_0": 60.0},
    ],
    "motion": [{"motion/ratio": 0.001}],
    "data": [{"time/data_wait": 0.9, "time/device": 0.01}],
}


def alarm_config(**changes):
    config = configs.default()
    config.alarms.update(changes)
    return config


def alarms_of(stream, **changes) -> list[list[str]]:
    """Returns the kinds of alarms at each interval of a stream of changes to healthy metrics."""
    alarms = Alarms(alarm_config(**changes).alarms)
    return [[alarm.kind for alarm in alarms.check(HEALTHY | change)] for change in stream]


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, many in BAD.items() for change in many])
def test_alarm_after_patience_once_and_again_after_recovery(kind, change):
    stream = [{}, change, change, {}, change, change, change, change, {}, change, change, change]
    expected = [[kind] if n in (6, 11) else [] for n in range(12)]
    assert alarms_of(stream, patience=3) == expected


def test_no_alarm_without_cause():
    assert alarms_of([{}] * 5, patience=1) == [[]] * 5
    # The host waits for data while the device is busy, which costs no time.
    assert alarms_of([{"time/data_wait": 0.85, "time/device": 0.1}], patience=1) == [[]]
    assert Alarms(alarm_config(patience=1).alarms).check({"loss/denoising": 1.0}) == []
    # One saturated head does not make a saturated discriminator.
    assert alarms_of([{"live/spatial_0": 0.0}], patience=1) == [[]]


@pytest.mark.parametrize("kind", BAD)
def test_thresholds_of_zero_turn_alarms_off(kind):
    off = dict(patience=1, min_live=0.0, max_gap=0.0, min_motion=0.0, max_data_wait=0.0)
    assert alarms_of(BAD[kind], **off) == [[]] * len(BAD[kind])


def test_first_cause_is_named():
    flags = {f"nonfinite/generator_gradient/{block}": True for block in ("conv_in", "up_blocks.0", "up_blocks.1")}
    fine = {"loss/hinge": 1.0, "nonfinite/batch/latents": False}
    assert not_finite(fine) is None
    assert not_finite(fine | {"loss/hinge": np.inf}) == "loss/hinge"
    # Backwards, up_blocks.1 comes before up_blocks.0; a bad batch before every gradient; gradients before parameters.
    assert not_finite(fine | flags) == "generator_gradient/up_blocks.1 (and 2 more)"
    assert not_finite(fine | flags | {"nonfinite/generator/conv_out": True}).startswith(
        "generator_gradient/up_blocks.1"
    )
    assert not_finite(fine | flags | {"nonfinite/batch/latents": True}) == "batch/latents (and 3 more)"
    assert (
        not_finite({"nonfinite/heads/spatial.0": True, "nonfinite/heads_gradient/spatial.0": False})
        == "heads/spatial.0"
    )


# ---- the journal ----


def journal(tmp_path, saved=None, **changes) -> Journal:
    config = alarm_config(**changes)
    return Journal(config, Clock(0), MetricWriter(tmp_path), ProgressReport(100), lambda: saved)


def step(**changes) -> dict:
    metrics = {"loss/hinge": 1.0, "motion/fake": 0.2, "motion/real": 0.4, "nonfinite/batch/latents": False}
    return {k: jnp.asarray(v) for k, v in (metrics | changes).items()}


def entries(folder) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_intervals_are_written_one_late_and_whole(tmp_path):
    log = journal(tmp_path)
    for n in range(4):
        log.add(step(**{"loss/hinge": float(n), "ratio/x": np.nan if n % 2 else 3.0}))
        if n % 2:
            log.end_interval()
            assert len(entries(tmp_path)) == (n == 3)  # steps 1 and 2 when the second interval ends
    log.flush()
    first, second = entries(tmp_path)
    assert (first["step"], second["step"]) == (2, 4)
    assert (first["loss/hinge"], second["loss/hinge"]) == (0.5, 2.5)
    assert first["ratio/x"] == 3.0  # the mean of the steps that measured it
    assert first["motion/ratio"] == pytest.approx(0.5) and not any(k.startswith("nonfinite") for k in first)


def test_no_times_around_a_wait_for_the_device(tmp_path):
    log = journal(tmp_path)
    for n in range(8):
        log.add(step())
        log.end_interval()
        if n == 3:
            log.flush(everything=True)
    assert [e["step"] for e in entries(tmp_path) if "time/step" in e] == [2, 3, 6, 7]


@pytest.mark.parametrize("everything", [True, False])
def test_nothing_bad_is_saved(tmp_path, everything):
    """Steps after the last interval are checked before a checkpoint, and only then."""
    log = journal(tmp_path, saved=6)
    log.add(step())
    log.end_interval()
    log.add(step())
    log.add(step(**{"nonfinite/batch/latents": True}))
    if not everything:
        log.flush()
        assert [e["step"] for e in entries(tmp_path)] == [1]
        return
    with pytest.raises(
        TrainingStopped, match="step 3: not finite: batch/latents; checkpoint 6 is untouched.*config.init"
    ):
        log.flush(everything=True)
    assert entries(tmp_path)[-1]["alarm"] == "nan" and entries(tmp_path)[-1]["step"] == 3


@pytest.mark.parametrize("on_alarm", ["warn", "stop"])
def test_what_an_alarm_does(tmp_path, capsys, on_alarm):
    log = journal(tmp_path, on_alarm=on_alarm, patience=1)
    log.add(step(**{"motion/fake": 1e-4}))
    log.end_interval()
    if on_alarm == "stop":
        with pytest.raises(TrainingStopped, match="step 1: frames stand still.*there is no checkpoint yet"):
            log.flush()
    else:
        log.flush()
        assert "ALARM at step 1: frames stand still" in capsys.readouterr().out
    assert [e["alarm"] for e in entries(tmp_path) if "alarm" in e] == ["motion"]


def test_alarms_survive_the_resume_that_drops_lines(tmp_path):
    writer = MetricWriter(tmp_path)
    for n in (1, 2, 3):
        writer.scalars(n, {"loss/hinge": np.nan})
    writer.alarm(3, "nan", "not finite")
    writer.resume(2)
    assert [(e["step"], "alarm" in e) for e in entries(tmp_path)] == [(1, False), (2, False), (3, True)]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # JSON has none
    writer.close()


def test_terminal_line():
    text = line(HEALTHY | {"time/data_wait": 0.5, "speed/mfu": 0.31})
    assert text == "1.000 s/step  data wait 50%  mfu 31%  hinge 1.5  live 70%  motion 0.70"
    assert summary([{"loss/hinge": 1.0}]) == {"loss/hinge": 1.0}


def test_wandb_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricWriter(tmp_path).close()
    with pytest.raises(ConfigError, match="config.wandb_project='p', but wandb is not installed: pip install wandb"):
        MetricWriter(tmp_path, wandb_project="p")
    calls = []
    record = lambda name: lambda *args, **kw: calls.append((name, args, kw))  # noqa: E731
    fake = types.SimpleNamespace(
        **{n: record(n) for n in ("init", "log", "alert", "finish")}, Image=lambda image: "image"
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricWriter(tmp_path, wandb_project="p", config={"seed": 1})
    writer.scalars(3, {"loss/hinge": 1.0})
    writer.image(3, "samples", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert [name for name, *_ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][2]["project"] == "p" and calls[0][2]["config"] == {"seed": 1}
    assert calls[1][1:] == (({"loss/hinge": 1.0},), {"step": 3})


# ---- speed ----


def test_flops_of_products_convolutions_loops_and_branches():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    product = lambda a, b: a @ b  # noqa: E731
    assert device.count_flops(product, a, b) == 2 * 3 * 4 * 5
    # The gradient with respect to one factor of a product costs another product.
    assert device.count_flops(jax.value_and_grad(lambda a: jnp.sum(jnp.tanh(a @ b))), a) == 2 * 2 * 3 * 4 * 5
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert device.count_flops(conv, x, kernel) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 2)
    square = jnp.ones((4, 4))
    loop = lambda x: jax.lax.scan(lambda c, _: (jax.jit(jax.checkpoint(product))(c, square), None), x, length=7)[0]  # noqa: E731
    assert device.count_flops(loop, square) == 7 * 2 * 4**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert device.count_flops(branch, square) == 2 * 2 * 4**3


@pytest.mark.parametrize("within", ["alone", "scan", "cond", "checkpoint"])
def test_flops_of_what_nothing_needs_are_not_counted(within):
    """The gradient of a frozen layer's kernel, which our convolutions compute with that of their input on a CPU."""
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))

    def gradient(x):
        layer = lambda x: jnp.sin(conv2d(x, kernel, ((1, 1), (1, 1))))  # noqa: E731
        layer = jax.checkpoint(layer) if within == "checkpoint" else layer
        return jax.grad(lambda x: jnp.sum(layer(x)))(x)

    wrapped = {
        "scan": lambda x: jax.lax.scan(lambda c, _: (gradient(c), None), x, length=3)[0],
        "cond": lambda x: jax.lax.cond(x[0, 0, 0, 0] > 0, gradient, jnp.zeros_like, x),
    }.get(within, gradient)
    once = 2 * (2 * 8 * 8 * 4) * (3 * 3 * 4)
    assert device.count_flops(wrapped, x) == (3 if within == "scan" else 1) * 2 * once  # forward, and to the input


def test_flops_of_xla():
    """XLA also counts elementwise operations, so its number is a little larger."""
    f = jax.jit(lambda x, w: jnp.sum((x @ w) @ (w.T @ w)))
    x, w = jnp.ones((64, 32)), jnp.ones((32, 48))
    xla = f.lower(x, w).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(device.count_flops(f, x, w), xla, rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_peak(kind, peak):
    assert device.peak_flops(kind) == peak


def test_clock_splits_the_time_of_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

    def pass_time(seconds, name=None):
        if name is None:
            now[0] += seconds
        else:
            with watch.measure(name):
                now[0] += seconds

    watch = Clock(0, flops=6e12, peak=20e12)
    pass_time(100.0, "device")
    assert watch.lap(1) == {}  # compiled
    for _ in range(2):
        pass_time(0.5, "data_wait")
        pass_time(2.0, "device")
        pass_time(0.5)
    found = watch.lap(3)
    expected = {"time/step": 3.0, "time/data_wait": 0.5, "time/device": 2.0, "time/host": 0.5}
    assert found == pytest.approx(expected | {"speed/tflops": 2.0, "speed/mfu": 0.1})
    watch.pause()
    assert watch.lap(4) == {}
    pass_time(1.0)
    assert "speed/mfu" not in Clock(0).lap(1) and watch.lap(5)["time/step"] == 1.0


def test_trace_covers_its_window(tmp_path):
    trace, running = Trace(tmp_path, start=2, steps=2), []
    for n in range(1, 8):
        trace.at(n, jnp.ones(()))
        running.append(trace.running)
    assert running == [False, False, True, True, False, False, False]
    assert list(tmp_path.rglob("*.xplane.pb"))
