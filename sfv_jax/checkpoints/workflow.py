"""ComfyUI workflow for an exported single file, in the format of ComfyUI's API, which its page opens too.

Names of nodes and inputs are those of ComfyUI's `nodes.py`, `comfy_extras/nodes_video_model.py` and
`comfy_extras/nodes_images.py`. Levels of ComfyUI's scheduler "karras" between SVD's sigma_max and sigma_min are those
of `edm.sampling_sigmas`: one step goes from 700 to 0.
"""

from dataclasses import dataclass
from typing import Any

# ComfyUI draws the noise of the condition for pixels in [0, 1], all else for pixels in [-1, 1]: there it is twice this.
PIXEL_RANGE = 2


@dataclass(frozen=True)
class Video:
    """Settings of a video; the defaults are those that SVD samples with.

    Attributes:
      width, height: pixels.
      fps, motion_bucket_id: conditions of the model.
      noise_aug_strength: strength of the noise on the condition, for pixels in [-1, 1].
    """

    width: int = 1024
    height: int = 576
    fps: float = 7
    motion_bucket_id: float = 127
    noise_aug_strength: float = 0.02


def workflow(file: str, frames: int, video: Video, *, one_step: bool) -> dict[str, Any]:
    """Returns the workflow: an image to a video.

    Args:
      file: name of the single file in ComfyUI's folder `models/checkpoints`.
      frames: frames of the video.
      video: its other settings.
      one_step: one step without guidance, instead of 25 with the guidance of SVD.
    """
    conditioning = {
        "clip_vision": ["checkpoint", 1],
        "init_image": ["resized", 0],
        "vae": ["checkpoint", 2],
        "width": video.width,
        "height": video.height,
        "video_frames": frames,
        "motion_bucket_id": round(video.motion_bucket_id),
        "fps": round(video.fps),
        "augmentation_level": video.noise_aug_strength / PIXEL_RANGE,
    }
    sampling = {
        "model": ["checkpoint" if one_step else "guidance", 0],
        "positive": ["condition", 0],
        "negative": ["condition", 1],
        "latent_image": ["condition", 2],
        "seed": 0,
        "steps": 1 if one_step else 25,
        "cfg": 1.0 if one_step else 3.0,
        "sampler_name": "lcm" if one_step else "euler",
        "scheduler": "karras",
        "denoise": 1.0,
    }
    size = {"width": video.width, "height": video.height, "upscale_method": "lanczos", "crop": "disabled"}
    saving = {"filename_prefix": "sfv", "fps": float(video.fps), "lossless": False, "quality": 90, "method": "default"}
    guidance = {"guidance": _node("VideoLinearCFGGuidance", model=["checkpoint", 0], min_cfg=1.0)}
    return {
        "checkpoint": _node("ImageOnlyCheckpointLoader", ckpt_name=file),
        "image": _node("LoadImage", image="example.png"),
        "resized": _node("ImageScale", image=["image", 0], **size),
        "condition": _node("SVD_img2vid_Conditioning", **conditioning),
        **({} if one_step else guidance),
        "sampler": _node("KSampler", **sampling),
        "frames": _node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "video": _node("SaveAnimatedWEBP", images=["frames", 0], **saving),
    }


def _node(kind: str, **inputs) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
