"""Model card (`README.md`) of an export. It contains only facts recorded by the run and the model folder."""

import json
import re
from pathlib import Path

from sfv_jax.checkpoints.workflow import PIXEL_RANGE, Video
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.files import in_code, in_markdown
from sfv_jax.weights.folders import printable

# Repositories of the networks that this package converts, as they appear in the origin of a model folder.
_KNOWN = re.compile(r"stable-video-diffusion-img2vid(-xt)?(-1-1)?(?![\w-])")
LINK = "https://huggingface.co/{}/blob/main/LICENSE.md"
LICENSE = """## License

These are the networks of Stable Video Diffusion. If they come from Stability AI's weights, as those of an imported
`stable-video-diffusion-img2vid` do, they are a derivative of them and Stability AI's community license applies,
whatever they were trained on afterwards. This card is no statement on that: check the origin above and the license
before you use or share the weights.
"""
ONE_STEP_METHODS = ("sfv",)
STEPS_OF_SVD = "sampler euler, scheduler karras, 20 to 25 steps, cfg 3, after *VideoLinearCFGGuidance* with min_cfg 1"
FEW_STEPS = (
    "For 2 or 3 steps use *KSamplerAdvanced* with steps 4, scheduler karras, end_at_step 2 or 3 and "
    "return_with_leftover_noise disable: it visits 700, 70.54 (and 2.269), the levels of the training. *KSampler* "
    "would visit 700 and 0.002 in 2 steps, and 700, 15.59 and 0.002 in 3."
)
AUGMENTATION = (
    "ComfyUI adds this noise to pixels in [0, 1]; diffusers, generative-models and sfv_jax add theirs to pixels in "
    "[-1, 1], where the same noise is twice the number"
)
TRIED = (
    "Files of this kind were loaded at full size, with random weights, by ComfyUI 0.12 and by Stability AI's "
    "generative-models: no tensor was missing, and the networks agreed with sfv_jax up to 7e-6 of the output's "
    "deviation for the UNet (once both used an epsilon of 1e-5 in the up blocks), 2e-5 for the VAE and 3e-6 for CLIP. "
    "These programs compute the norms of all residual blocks with 1e-5; diffusers and sfv_jax most of them with 1e-6."
)
# Fields of a run's config in which trainings differ, in the order of the card.
_SETTINGS = (
    "batch_size",
    "accumulation_steps",
    "dtype",
    "ema_decay",
    "seed",
    "generator_optimizer",
    "heads_optimizer",
    "discriminator",
    "sfv",
    "teacher",
)


def model_card(
    unet: UNetConfig,
    meta: dict,
    *,
    what: str,
    name: str,
    variant: str | None,
    run: dict | None = None,
    video: Video | None = None,
) -> str:
    """Returns the text of the card.

    Args:
      unet: config of the UNet.
      meta: `model.json` of the model folder of the VAE and CLIP tower.
      what: "pipeline", "unet" or "comfyui".
      name: name of the exported folder or file.
      variant: "fp16" or None.
      run: `{"step", "raw", "config"}` of a training run, `config` from its `config.json`; None for a model folder.
      video: settings of the videos; default: SVD's.
    """
    method = run["config"].get("method") if run else None
    title = f"# {in_markdown(Path(name).stem if what == 'comfyui' else name)}"
    sections = [
        _front_matter(meta, run) + title,
        _summary(method, run),
        _usage(unet, what, name, variant, method, video or Video(), base_model(meta)),
    ]
    if run:
        sections.append(_training(run))
    sections += [_origin(meta), LICENSE]
    return "\n".join(section.rstrip() + "\n" for section in sections)


def base_model(meta: dict) -> str | None:
    """Returns the repository of the base model, if the recorded origin of a model folder names it; else None."""
    found = _KNOWN.search(str(meta.get("source", {}).get("folder", "")))
    return f"stabilityai/{found[0]}" if found else None


def _front_matter(meta: dict, run: dict | None) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: image-to-video", "license: other"]
    if base := base_model(meta):
        lines += ["license_name: stable-video-diffusion-community", f"license_link: {LINK.format(base)}"]
        lines += [f"base_model: {base}", *(["base_model_relation: finetune"] if run else [])]
    tags = "".join(f"\n- {tag}" for tag in ("image-to-video", "stable-video-diffusion"))
    return "\n".join(["---", *lines, f"tags:{tags}", "---", ""])


def _summary(method: str | None, run: dict | None) -> str:
    if not run:
        return "Stable Video Diffusion (image to video), written by sfv_jax from a model folder. Not trained here.\n"
    kind = "A one-step image-to-video generator: " if method in ONE_STEP_METHODS else "An image-to-video model: "
    weights = "the trained weights themselves" if run["raw"] else "the moving average of the weights"
    return (
        f"{kind}the UNet of Stable Video Diffusion after {run['step']:,} training steps of method {in_code(method)} in "
        f"sfv_jax; {weights}. VAE and CLIP tower are those of the base model, unchanged.\n"
    )


def _usage(
    unet: UNetConfig,
    what: str,
    name: str,
    variant: str | None,
    method: str | None,
    video: Video,
    base: str | None,
) -> str:
    one_step = method in ONE_STEP_METHODS
    if what == "comfyui":
        return _comfyui(unet, name, one_step, video)
    call = (
        "num_inference_steps=1, min_guidance_scale=1, max_guidance_scale=1"
        if one_step
        else "num_inference_steps=25, min_guidance_scale=1, max_guidance_scale=3"
    )
    ids = f"fps={video.fps:g}, motion_bucket_id={video.motion_bucket_id:g}"
    ids += f", noise_aug_strength={video.noise_aug_strength:g}"
    half = ', variant="fp16", torch_dtype=torch.float16' if variant else ""
    names = ["StableVideoDiffusionPipeline"]
    if what == "unet":
        names.append("UNetSpatioTemporalConditionModel")
        load = (
            f"unet = UNetSpatioTemporalConditionModel.from_pretrained({_quoted(name)}{half})\n"
            f"pipe = StableVideoDiffusionPipeline.from_pretrained({_quoted(base or 'BASE_MODEL')}, unet=unet{half})"
        )
    else:
        load = f"pipe = StableVideoDiffusionPipeline.from_pretrained({_quoted(name)}{half})"
    size = f"height={video.height}, width={video.width}, num_frames={unet.num_frames}"
    lines = [
        *(["import torch"] if variant else []),
        f"from diffusers import {', '.join(names)}",
        "from diffusers.utils import export_to_video, load_image\n",
        load,
        'image = load_image("in.png")  # another shape than the video\'s is stretched',
        f"frames = pipe(\n    image, {size},\n    {call},\n    {ids},\n).frames[0]",
        f'export_to_video(frames, "out.mp4", fps={round(video.fps)})',
    ]
    return "## Use in diffusers\n\n```python\n" + "\n".join(lines) + "\n```\n"


def _comfyui(unet: UNetConfig, name: str, one_step: bool, video: Video) -> str:
    sampler = "sampler lcm (or euler), scheduler karras, steps 1, cfg 1" if one_step else STEPS_OF_SVD
    few = f"\n\n{FEW_STEPS}" if one_step else ""
    level = video.noise_aug_strength / PIXEL_RANGE
    return (
        "## Use in ComfyUI\n\n"
        f"Put {in_code(name)} into `models/checkpoints` and open {in_code(Path(name).stem + '.json')}, a workflow with "
        "these settings:\n\n"
        f"- *SVD_img2vid_Conditioning*: {video.width} x {video.height}, {unet.num_frames} frames, motion bucket "
        f"{round(video.motion_bucket_id)}, fps {round(video.fps)}, augmentation level {level:g} ({AUGMENTATION})\n"
        f"- *KSampler*: {sampler} (any scheduler but ddim_uniform and kl_optimal)\n"
        "- an image of the video's own size: ComfyUI crops others, and crops every image to a square for CLIP, where "
        "diffusers and sfv_jax stretch it"
        f"{few}\n\n{TRIED}\n"
    )


def _training(run: dict) -> str:
    config = run["config"]
    data = config.get("data", {})
    where = "the procedural world" if data.get("source") == "world" else f"latent cache {in_code(data.get('path'))}"
    lines = [
        "## Training\n",
        f"- method: {in_code(config.get('method'))}",
        f"- steps: {run['step']:,} of {config.get('steps'):,}",
        f"- weights: {'raw' if run['raw'] else 'moving average'}",
        f"- data: {where}, split {in_code(data.get('split'))}",
        f"- started from: {in_code(config.get('init') or 'random weights')}",
    ]
    lines += [f"- {field}: {in_code(_short(config[field]))}" for field in _SETTINGS if field in config]
    return "\n".join(lines)


def _quoted(name: str) -> str:
    """Returns a name as a string of Python."""
    return json.dumps(name, ensure_ascii=not name.isprintable())


def _short(value) -> str:
    return json.dumps(value) if isinstance(value, dict | list | str) else str(value)


def _cell(text: object) -> str:
    """Returns a cell of a table with `text` as code."""
    return in_code(printable(text)).replace("|", "\\|")


def _origin(meta: dict) -> str:
    source = meta.get("source", {})
    if not source:
        return "## Origin of the base model\n\nNot recorded.\n"
    digests = "\n".join(
        f"| {_cell(file)} | {_cell(digest)} |" for file, digest in sorted(source.get("sha256", {}).items())
    )
    folder = in_code(printable(source.get("folder")))
    return (
        f"## Origin of the base model\n\nImported from {folder}, from these files:\n\n"
        f"| file | SHA-256 |\n| --- | --- |\n{digests}\n"
    )
