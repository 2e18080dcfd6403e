"""Proof at full size: SVD's three networks with random weights, through the converter and back, and computed both ways.

    python -m tests.fullsize --folder DIR [--dtype fp32|fp16]

Too large for the suite: 27 GB of disk for fp32 and 14 GB for fp16, 10 GiB of memory, up to half an hour of two cores.
Every stage is a process of its own, so torch's networks and ours are never in memory together:

1. make      a diffusers folder with every parameter random, `DIR/source-DTYPE` (kept if it is there)
2. import    `sfv_jax.convert`, then a comparison of every tensor, bit by bit
3. export    `sfv_jax.convert --export`, then the same
4. forward   diffusers and transformers in float64, then ours in fp32: deviations in units of the output's std

Ends with a table and status 1 if anything missed its gate.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from tests.support.golden import CONFIGS as TINY
from tests.support.golden import noise, random_tensor

CONFIGS = {"unet": UNetConfig.svd(), "vae": VAEConfig.svd(), "image_encoder": CLIPConfig.svd()}
PARAMETERS = {"unet": 1_524_623_082, "vae": 97_742_847, "image_encoder": 632_076_800}
GATES = {  # (largest error, rms), as in the suite
    "unet": (1e-5, 3e-6),
    "encoder": (5e-5, 2e-5),
    "decoder": (1e-4, 2e-5),
    "clip": (1e-5, 1e-5),
}
INPUTS = {
    "unet": (
        noise(0, 2, 2, 16, 16, 8),  # 16, 8, 4 and 2 cells wide on the four levels
        np.array([1.2, -0.4], np.float32),
        noise(1, 2, 1024),
        np.array([[6, 127, 0.02], [11, 40, 0.1]], np.float32),
    ),
    "encoder": (noise(2, 1, 2, 64, 64, 3),),
    "decoder": (noise(3, 1, 2, 8, 8, 4),),
    "clip": (noise(4, 2, 224, 224, 3),),
}
NETWORK = {"unet": "unet", "encoder": "vae", "decoder": "vae", "clip": "image_encoder"}


# ---- stages, each in its own process ----


def make(folder: Path, half: bool) -> None:
    """Writes the diffusers folder, one network in memory at a time."""
    import torch

    from tests.support import reference

    tiny = reference.pipeline(*TINY.values())
    reference.save(tiny, folder)  # for the small files beside the networks
    for seed, (name, config) in enumerate(CONFIGS.items()):
        shutil.rmtree(folder / name)
        with torch.device("meta"):
            model = getattr(reference, name)(config, random=False)
        model = (model.half() if half else model).to_empty(device="cpu")
        for key, parameter in model.named_parameters():
            parameter.data.copy_(torch.from_numpy(random_tensor(key, tuple(parameter.shape), seed)))
        model.save_pretrained(folder / name, variant="fp16" if half else None)
        del model


def compare(source: Path, other: Path, half: bool) -> None:
    """Raises AssertionError unless the model or diffusers folder `other` holds the tensors of `source`, bit by bit."""
    from safetensors import safe_open

    from sfv_jax.weights.components import COMPONENTS

    for name, spec in COMPONENTS.items():
        file_name = f"{spec.weights}{'.fp16' if half else ''}.safetensors"
        with safe_open(source / name / file_name, "np") as expected:
            is_model = (other / "model.json").is_file()
            found, read = model_tensors(other, name) if is_model else file_tensors(other / name / file_name)
            assert sorted(found) == sorted(expected.keys()), f"{name}: the names differ"
            parameters = 0
            for key in found:
                a, b = read(key), expected.get_tensor(key)
                assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b), f"{name}: {key} differs"
                parameters += b.size
        assert parameters == PARAMETERS[name], f"{name}: {parameters:,} parameters"
        print(f"{name}: {len(found)} tensors, {parameters:,} parameters, bit-equal")


def file_tensors(path: Path):
    """`(names, read)` of a safetensors file."""
    from safetensors import safe_open

    file = safe_open(path, "np")
    return list(file.keys()), file.get_tensor


def model_tensors(folder: Path, component: str):
    """`(names, read)` of a network in a model folder, under diffusers' names and with its axes."""
    from sfv_jax.checkpoints.model_folder import load_model
    from sfv_jax.models import tree
    from sfv_jax.weights.diffusers import their_name, to_theirs

    flat = tree.flatten(load_model(folder, (component,))[0][component])
    paths = {their_name(path): path for path in flat}
    assert len(paths) == len(flat)
    return list(paths), lambda key: to_theirs(paths[key], np.asarray(flat[paths[key]]))


def theirs(source: Path, out: Path, part: str, half: bool) -> None:
    """Runs one part of the reference on `INPUTS` in float64, and in fp32 to know the noise of that precision."""
    import diffusers
    import torch
    import transformers

    from sfv_jax.weights.components import COMPONENTS
    from tests.support import reference

    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    spec = COMPONENTS[NETWORK[part]]
    library = {"diffusers": diffusers, "transformers": transformers}[spec.library]
    model = getattr(library, spec.class_name).from_pretrained(
        source / NETWORK[part], variant="fp16" if half else None, dtype=torch.float32
    )
    results = {}
    for name, dtype in (("single", torch.float32), ("double", torch.float64)):
        if dtype == torch.float64:
            model = compute_in_double(model) if part == "unet" else model.double()
        results[name] = getattr(reference, f"{part}_output")(model.eval(), *INPUTS[part], dtype=dtype)
    np.savez(out, **results)


def compute_in_double(model):
    """Each module's own parameters become float64 while it runs: the exact values at half the memory.

    For networks that do not ask for the dtype of their parameters from outside, as the VAE and CLIP do.
    """
    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(lambda module, inputs: cast_own(module, "double"))
            module.register_forward_hook(lambda module, inputs, result: cast_own(module, "float"))
    return model


def cast_own(module, dtype: str) -> None:
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = getattr(parameter.data, dtype)()


def ours(model: Path, out: Path, part: str) -> None:
    """Runs one part of ours on `INPUTS` in fp32, jitted."""
    import jax

    from sfv_jax.checkpoints.model_folder import load_model
    from sfv_jax.models import tree
    from sfv_jax.weights.components import COMPONENTS

    jax.config.update("jax_default_matmul_precision", "highest")
    name = NETWORK[part]
    params, configs, _ = load_model(model, (name,), dtype=np.float32)
    graph, _ = tree.abstract(COMPONENTS[name].module, configs[name])

    method = {"encoder": "encode", "decoder": "decode"}.get(part, "__call__")

    def run(params, *inputs):
        return getattr(tree.build(graph, params), method)(*inputs)

    np.save(out, np.asarray(jax.jit(run)(params[name], *INPUTS[part])))


# ---- the whole ----


def stage(name: str, *command: str) -> tuple[str, float, float]:
    """Runs `python -m ...` and returns (name, seconds, peak GiB). Raises CalledProcessError if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, name)
    row = name, time.perf_counter() - began, usage.ru_maxrss / 2**20
    print(f"{name}: {row[1]:.0f} s, peak {row[2]:.1f} GiB", flush=True)
    return row


def convert(folder: Path, dtype: str) -> list[tuple[str, float, float]]:
    """Makes the source if need be, imports and exports it and compares; the times."""
    source, model, back = (folder / f"{name}-{dtype}" for name in ("source", "model", "back"))
    fp16 = ["--fp16"] * (dtype == "fp16")
    partial = folder / f"partial-{dtype}"
    rows = []
    if not source.exists():
        shutil.rmtree(partial, ignore_errors=True)
        rows.append(stage("make", "tests.fullsize", "make", str(partial), *fp16))
        partial.rename(source)
    for name, command in (
        ("import", ["--src", str(source), "--dst", str(model), *fp16]),
        ("export", ["--export", "--src", str(model), "--dst", str(back), *fp16]),
    ):
        result = model if name == "import" else back
        shutil.rmtree(result, ignore_errors=True)
        rows.append(stage(name, "sfv_jax.convert", *command))
        rows.append(stage(f"compare {name}ed", "tests.fullsize", "compare", str(source), str(result), *fp16))
    shutil.rmtree(back)
    return rows


def forward(folder: Path, dtype: str, part: str) -> tuple[list, dict]:
    """Both sides' outputs of one part: the times, and deviations from float64 as `{side: (largest, rms)}`."""
    fp16 = ["--fp16"] * (dtype == "fp16")
    expected, found = folder / f"{part}-{dtype}.npz", folder / f"{part}-{dtype}.npy"
    source, model = str(folder / f"source-{dtype}"), str(folder / f"model-{dtype}")
    rows = [
        stage(f"{part} theirs", "tests.fullsize", "theirs", source, str(expected), part, *fp16),
        stage(f"{part} ours", "tests.fullsize", "ours", model, str(found), part),
    ]
    results = np.load(expected)
    double = results["double"]

    def deviation(x: np.ndarray) -> tuple[float, float]:
        difference = np.abs(x.astype(np.float64) - double) / double.std()
        return float(difference.max()), float(np.sqrt(np.mean(difference**2)))

    return rows, {"ours": deviation(np.load(found)), "torch fp32": deviation(results["single"])}


def prove(folder: Path, dtype: str) -> bool:
    """All stages and the tables; whether every gate was passed."""
    folder.mkdir(parents=True, exist_ok=True)
    times, deviations = convert(folder, dtype), {}
    for part in GATES:
        rows, deviations[part] = forward(folder, dtype, part)
        times += rows
    print(f"\n| stage, {dtype} weights | seconds | peak GiB |\n| --- | ---: | ---: |")
    for name, seconds, peak in times:
        print(f"| {name} | {seconds:.0f} | {peak:.1f} |")
    print("\n| part | ours, largest | rms | torch in fp32, largest | rms | gate | |\n|" + " --- |" * 7)
    passed = True
    for part, by_side in deviations.items():
        good = all(x <= gate for x, gate in zip(by_side["ours"], GATES[part], strict=True))
        passed = passed and good
        figures = " | ".join(f"{x:.1e}" for side in by_side.values() for x in side)
        print(f"| {part} | {figures} | {GATES[part][0]:.0e}, rms {GATES[part][1]:.0e} | {'' if good else 'MISSED'} |")
    return passed


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("make", "compare", "theirs", "ours"):
        name, *arguments = [argument for argument in sys.argv[1:] if argument != "--fp16"]
        return run_stage(name, arguments, "--fp16" in sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the data goes; the weights are kept there")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the weights on disk")
    args = parser.parse_args()
    try:
        sys.exit(0 if prove(args.folder, args.dtype) else "a gate was missed")
    except subprocess.CalledProcessError as error:
        sys.exit(f"stage {error.cmd} failed with status {error.returncode}")


def run_stage(name: str, arguments: list[str], half: bool) -> None:
    paths = [Path(argument) for argument in arguments[:2]]
    if name == "make":
        make(*paths, half)
    elif name == "compare":
        compare(*paths, half)
    elif name == "theirs":
        theirs(*paths, arguments[2], half)
    else:
        ours(*paths, arguments[2])


if __name__ == "__main__":
    main()
