"""Values of enum flags and config fields, without imports of the modules that define them.

A test compares them with those modules.
"""

from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")  # models.networks.DTYPES
SAMPLERS = ("euler", "sfv", "sfv_euler", "animatelcm")  # diffusion.solvers.SAMPLERS
VIDEO_FORMATS = ("mp4", "gif", "webp", "png")  # suffixes of data.video.write_video
EXPORTS = ("pipeline", "unet", "comfyui", "model", "encoders", "taesdv")  # checkpoints.exporter.WHAT, a tiny decoder's
TINY_DECODER = "tiny_decoder"  # folder of the tiny decoder in a model folder
STORED_DTYPES = ("source", "float32", "float16", "bfloat16")  # checkpoints.importer.DTYPES
NETWORKS = ("svd", "mid", "small", "tiny")  # performance.measurement.NETWORKS
TABLES = ("table1", "table2", "table3", "losses", "balance", "recipe", "noise")  # reproduction.experiments.TABLES
DATASETS = ("ucf101", "folder", "world")  # evaluation.request.COUNTS
UCF101_SPLITS = (*(f"{kind}list0{n}" for kind in ("train", "test") for n in (1, 2, 3)), "all")  # data.ucf101.SPLITS
PACKAGED = ("world", "world-teacher", "world-decoder", "world-encoders")  # checkpoints.box.NAMES
JOBS = ("train", "sample", "prepare")  # performance.job.WHAT

SIZES = {  # (height, width) of videos by name
    "svd": (576, 1024),  # SVD and SVD-XT
    "sfv": (448, 768),  # SF-V's training
    "portrait": (1024, 576),
    "sfv-portrait": (768, 448),
    "square": (768, 768),
    "small": (128, 192),
}
FITS = ("crop", "pad", "stretch")  # data.images.fitted
COLORS = ("keep", "match")  # sampling.extension.correction


def auto_dtype(platform: str) -> str:
    """Returns the compute dtype that "auto" stands for in training on "cpu", "gpu" or "tpu"."""
    return "float32" if platform == "cpu" else "bfloat16"  # bf16 on CPU is slower and takes more memory


MOST_PIXELS = 2**14  # of a side: the limit of H.264 encoders
FPS = (0.01, 1000.0)  # range of frame rates: WebP counts milliseconds
MOST_SEED = 2**32 - 1  # JAX uses the lowest 32 bits of a seed
MOST_MOTION = 1023  # of the motion bucket; SVD was trained on 0 to 255
MOST_CHUNKS = 1000  # by which a video is extended
MOST_NOISE = 10.0  # standard deviation on the condition, for pixels in [-1, 1]
METHODS = ("sfv", "teacher", "animatelcm", "ufogen", "ladd", "vae", "decoder")  # methods.METHODS
TEMPORAL_CONVS = ("auto", "conv", "matmul")  # models.layers.TemporalConv
TINY_DECODERS = ("tiny", "wide")  # models.tiny_decoder.VARIANTS
ATTENTION_KERNELS = ("auto", "einsum", "blocked", "looped", "reduce", "cudnn", "splash")  # models.attention.attention
SHAPES = ("disc", "square", "triangle", "ring")  # data.worlds.SHAPES
COLOURS = ("red", "orange", "yellow", "green", "blue", "violet")  # data.worlds.PALETTE


def is_there(path: str) -> bool:
    """Returns whether a path exists or is the name of a model in the package."""
    return path in PACKAGED or Path(path).exists()
