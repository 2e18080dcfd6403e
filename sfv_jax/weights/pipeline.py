"""Reader and writer of a whole StableVideoDiffusionPipeline folder: networks and small files."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sfv_jax.models import clip, tree
from sfv_jax.runtime.files import write_json
from sfv_jax.weights.components import COMPONENTS, DIFFUSERS_VERSION, is_number, to_json
from sfv_jax.weights.diffusers import lazy_params, open_component, save_component
from sfv_jax.weights.folders import WeightsError, new_folder, printable, read_json, sums_of, write_sums

PIPELINE = "StableVideoDiffusionPipeline"
SIGMAS = {"sigma_min": 0.002, "sigma_max": 700.0}  # of SVD's scheduler_config.json
NOISE = SIGMAS | {"rho": 7.0}  # rho is a constant of diffusers

# With Karras sigmas between two limits the betas have no effect, but diffusers requires them.
SCHEDULER = SIGMAS | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
FEATURE_EXTRACTOR = {
    "image_processor_type": "CLIPImageProcessor",
    "feature_extractor_type": "CLIPImageProcessor",
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(clip.MEAN),
    "image_std": list(clip.STD),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}


def open_pipeline(folder: str | Path, *, variant: str | None = None, dtype=None, allow_pickle: bool = False):
    """Opens a StableVideoDiffusionPipeline folder without reading its weights.

    Args:
      folder: the pipeline's folder.
      variant, allow_pickle: as for `diffusers.open_component`.
      dtype: as for `diffusers.lazy_params`.
    Returns:
      params: `{"unet": ..., "vae": ..., "image_encoder": ...}`, nested dicts of `Lazy` leaves.
      configs: our configs by the same names.
      scheduler: `{"sigma_min", "sigma_max", "rho"}`.
      files: `{"unet/config.json": path}` of all weight files and their configs.
    Raises:
      WeightsError: if the folder is not such a pipeline, or any part of it differs from SVD's networks.
    """
    folder = Path(folder)
    check_pipeline(folder)
    scheduler = read_scheduler(folder)
    check_normalisation(folder)
    params, configs, files = {}, {}, {}
    for name in COMPONENTS:
        tensors, configs[name] = open_component(folder / name, name, variant=variant, allow_pickle=allow_pickle)
        params[name] = lazy_params(tensors, name, configs[name], dtype)
        files |= {f"{name}/{file.name}": file for file in (*tensors.files, folder / name / "config.json")}
    return params, configs, scheduler, files


def check_pipeline(folder: Path) -> None:
    """Checks that `model_index.json` names SVD's pipeline.

    Raises:
      WeightsError: if it is missing or names another pipeline.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder")
    if not (folder / "model_index.json").is_file():
        raise WeightsError(f"{folder} has no model_index.json: not a diffusers pipeline folder")
    found = read_json(folder / "model_index.json").get("_class_name")
    if found != PIPELINE:
        raise WeightsError(f"{folder}/model_index.json describes a {printable(found)}, expected a {PIPELINE}")


def read_scheduler(folder: Path) -> dict:
    """Reads the noise range of the pipeline's scheduler.

    Returns:
      `NOISE`.
    Raises:
      WeightsError: if the networks were not trained for v-prediction, or at other noise levels than SVD's.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    data = read_json(path)
    if data.get("prediction_type") != "v_prediction":
        raise WeightsError(f"{path}: prediction_type is {data.get('prediction_type')!r}, SVD's is 'v_prediction'")
    if data.get("use_karras_sigmas", True) is not True:
        raise WeightsError(f"{path}: use_karras_sigmas is {data['use_karras_sigmas']!r}, SVD's is True")
    check_noise({name: data.get(name) for name in SIGMAS}, str(path))
    return dict(NOISE)


def check_noise(found: Mapping[str, object], where: str) -> None:
    """Checks noise levels that a file records.

    Everything here trains and samples between SVD's levels, which are those of SF-V, so a model of other levels would
    be sampled wrongly.

    Args:
      found: values by name, some or all of `NOISE`.
      where: the file's name, for the error message.
    Raises:
      WeightsError: if one is not SVD's within the rounding of half precision.
    """
    for name, value in found.items():
        if name not in NOISE or not is_number(value) or not math.isclose(value, NOISE[name], rel_tol=5e-3):
            known = NOISE.get(name, "absent")
            raise WeightsError(f"{where}: {name} is {value!r}, SVD's is {known}: other noise levels are not supported")


def check_normalisation(folder: Path) -> None:
    """Checks that the pipeline normalizes CLIP's images as `clip.preprocess` does.

    Raises:
      WeightsError: if its mean or standard deviation differs.
    """
    path = folder / "feature_extractor" / "preprocessor_config.json"
    data = read_json(path)
    for field, ours in (("image_mean", clip.MEAN), ("image_std", clip.STD)):
        found = data.get(field, list(ours))
        numbers = isinstance(found, list) and len(found) == len(ours) and all(map(is_number, found))
        if not numbers or not np.allclose(found, ours, atol=1e-6):
            raise WeightsError(f"{path}: {field} is {found}, here it must be {list(ours)}")


def save_pipeline(
    folder: str | Path,
    load: Callable[[str], tree.Params],
    configs: dict,
    scheduler: dict,
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `StableVideoDiffusionPipeline.from_pretrained` loads, complete or not at all.

    Args:
      folder: the folder to write.
      load: function from the name of a component to its parameters; called once per component, so that memory holds
        one component at a time.
      configs: our configs of all three components by name.
      scheduler: `{"sigma_min", "sigma_max"}`. With one step diffusers starts at sigma_max and ends at 0.
      variant: "fp16" for half precision files with that suffix, None for fp32.
      max_shard_size: as for `save_component`.
      card: text of the `README.md` of a folder for others, which gets checksums too; None writes neither.
      overwrite: replace an existing folder.
    Raises:
      WeightsError: if the folder exists, or a component cannot be expressed (see `save_component`).
    """
    index = {"_class_name": PIPELINE, "_diffusers_version": DIFFUSERS_VERSION}
    index |= {name: [c.library, c.class_name] for name, c in COMPONENTS.items()}
    index |= {"scheduler": ["diffusers", SCHEDULER["_class_name"]]}
    index |= {"feature_extractor": ["transformers", FEATURE_EXTRACTOR["image_processor_type"]]}
    for name in COMPONENTS:
        to_json(name, configs[name])  # refuse before anything large is loaded
    with new_folder(folder, overwrite=overwrite) as partial:
        for name in COMPONENTS:
            shards = {"variant": variant, "max_shard_size": max_shard_size}
            save_component(partial / name, name, load(name), configs[name], **shards)
        for name in ("scheduler", "feature_extractor"):
            (partial / name).mkdir()
        write_json(partial / "scheduler" / "scheduler_config.json", SCHEDULER | {k: scheduler[k] for k in SIGMAS})
        write_json(partial / "feature_extractor" / "preprocessor_config.json", FEATURE_EXTRACTOR)
        if card is not None:
            (partial / "README.md").write_text(card)
            write_sums(sums_of(partial), [file for name in COMPONENTS for file in (partial / name).iterdir()])
        write_json(partial / "model_index.json", index)
