"""Values of enum flags and config fields, without imports of the modules that define them.

A test compares them with those modules.
"""

DTYPES = ("float32", "bfloat16", "float16")  # models.networks.DTYPES
SAMPLERS = ("euler", "sfv", "sfv_euler", "animatelcm")  # diffusion.solvers.SAMPLERS
VIDEO_FORMATS = ("mp4", "gif", "webp", "png")  # suffixes of data.video.write_video
EXPORTS = ("pipeline", "unet", "comfyui", "model", "encoders", "taesdv")  # checkpoints.exporter.WHAT, a tiny decoder's
TINY_DECODER = "tiny_decoder"  # folder of the tiny decoder in a model folder
STORED_DTYPES = ("source", "float32", "float16", "bfloat16")  # checkpoints.importer.DTYPES
NETWORKS = ("svd", "mid", "small", "tiny")  # performance.measurement.NETWORKS
TABLES = ("table1", "table2", "table3", "losses", "balance", "noise")  # reproduction.experiments.TABLES
DATASETS = ("ucf101", "folder", "world")  # evaluation.request.COUNTS
UCF101_SPLITS = (*(f"{kind}list0{n}" for kind in ("train", "test") for n in (1, 2, 3)), "all")  # data.ucf101.SPLITS
JOBS = ("train", "sample", "prepare")  # performance.job.WHAT

MOST_PIXELS = 2**14  # of a side: the limit of H.264 encoders
FPS = (0.01, 1000.0)  # range of frame rates: WebP counts milliseconds
MOST_SEED = 2**32 - 1  # JAX uses the lowest 32 bits of a seed
MOST_MOTION = 1023  # of the motion bucket; SVD was trained on 0 to 255
MOST_NOISE = 10.0  # standard deviation on the condition, for pixels in [-1, 1]
METHODS = ("sfv", "teacher", "animatelcm", "ufogen", "ladd", "vae", "decoder")  # methods.METHODS
TINY_DECODERS = ("tiny", "wide")  # models.tiny_decoder.VARIANTS
ATTENTION_KERNELS = ("auto", "einsum", "blocked", "looped", "reduce", "cudnn", "splash")  # models.attention.attention
SHAPES = ("disc", "square", "triangle", "ring")  # data.worlds.SHAPES
COLOURS = ("red", "orange", "yellow", "green", "blue", "violet")  # data.worlds.PALETTE
