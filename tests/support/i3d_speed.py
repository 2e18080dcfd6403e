"""Speed of I3D on this machine, beside torch on the same weights, or its cost on an accelerator that is not there.

    taskset -c 0 python -m tests.support.i3d_speed
    python -m tests.support.i3d_speed --target h200

The first times both networks in turns on one clip and compares them with matrix products of the same precision; the
second compiles for the target (see docs/planning.md for what that needs).
"""

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.evaluation.kinetics import CONFIG
from sfv_jax.models import tree
from sfv_jax.models.i3d import I3D, preprocess
from sfv_jax.performance import cost, targets, timing
from sfv_jax.performance.programs import Program, shapes
from sfv_jax.runtime.device import count_flops
from sfv_jax.runtime.sharding import make_mesh

GRAPH, SHAPES = tree.abstract(I3D, CONFIG)


def logits(params, frames):
    """Returns the logits of frames uint8 `[b, t, h, w, 3]`, as `fvd.load_i3d` does."""
    return tree.build(GRAPH, params)(preprocess(frames))


def here(shape: tuple[int, ...], repeats: int) -> None:
    """Prints clips per second of both networks on the present CPU."""
    import torch

    from tests.support import i3d_torch, random_i3d

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    weights, frames = random_i3d.weights(), np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    ours, theirs = jax.jit(logits), i3d_torch.network(weights, CONFIG.batch_norm_eps, torch.float32)
    params, prepare = tree.unflatten(jax.tree.map(jnp.asarray, weights)), jax.jit(preprocess)

    def in_torch() -> np.ndarray:
        with torch.inference_mode():
            return theirs(np.asarray(prepare(frames)).copy())

    calls = {"JAX": lambda: ours(params, frames), "torch": in_torch}
    timed, flops = timing.alternate(calls, repeats), count_flops(logits, params, frames) / shape[0]
    limit = timing.matmul_limit("float32")
    print(f"I3D, uint8 {list(shape)}, fp32, {cores} cores; {flops / 1e9:.1f} GFLOP per clip")
    print(f"matrix products: {limit / 1e9:.1f} GFLOP/s")
    for name, times in timed.items():
        speed = shape[0] / times.median
        print(f"{name}: {times} per call, {speed:.3f} clips/s, {speed * flops / limit:.0%} of the matrix products'")
    print(f"JAX is {timed['torch'].median / timed['JAX'].median:.2f} times as fast as torch")
    found, expected = np.asarray(calls["JAX"]()), calls["torch"]()
    print(f"largest difference of logits: {np.abs(found - expected).max() / np.abs(expected).max():.1e} of the largest")


def there(shape: tuple[int, ...], name: str) -> None:
    """Prints the cost of one call on a target."""
    target = targets.parse(name)
    targets.prepare(target)
    mesh = make_mesh(devices=targets.devices(target)[:1])
    params = shapes(mesh, **{k: (x.shape, x.dtype) for k, x in tree.flatten(SHAPES).items()})
    frames = shapes(mesh, frames=(shape, jnp.uint8))["frames"]
    args = (tree.unflatten(params), frames)
    program = Program("i3d", jax.jit(logits), args, {"parameters": args[0], "frames": frames}, logits)
    found = cost.measure(program, target, mesh, target.chip.memory)
    print(f"{name}: uint8 {list(shape)}: {found.needed / cost.GIB:.2f} GiB, {found.model_flops / 1e12:.3f} TFLOP")
    bound = found.roofline
    print(f"traffic {found.bytes / 1e9:.2f} GB, bound {bound * 1e3:.3f} ms or {shape[0] / bound:.0f} clips/s")
    print(f"custom kernels: {found.kernels}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 14, 240, 320), help="clips, frames, height, width")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--target", help="an accelerator, such as h200; default: this machine")
    given = parser.parse_args()
    shape = (*given.shape, 3)
    if given.target:
        there(shape, given.target)
    else:
        here(shape, given.repeats)


if __name__ == "__main__":
    main()
