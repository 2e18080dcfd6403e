"""Values of enum flags, without imports of the modules that define them; a test compares them with those modules."""

DTYPES = ("float32", "bfloat16", "float16")  # models.networks.DTYPES
SAMPLERS = ("euler", "sfv", "sfv_euler", "animatelcm")  # diffusion.solvers.SAMPLERS
VIDEO_FORMATS = ("mp4", "gif", "webp", "png")  # suffixes of data.video.write_video
EXPORTS = ("pipeline", "unet", "comfyui")  # checkpoints.exporter.WHAT
STORED_DTYPES = ("source", "float32", "float16", "bfloat16")  # checkpoints.importer.DTYPES
NETWORKS = ("svd", "mid", "small", "tiny")  # performance.measurement.NETWORKS
TABLES = ("table1", "table2", "table3", "losses")  # reproduction.experiments.TABLES
DATASETS = ("ucf101", "folder", "world")  # evaluation.request.COUNTS
UCF101_SPLITS = (*(f"{kind}list0{n}" for kind in ("train", "test") for n in (1, 2, 3)), "all")  # data.ucf101.SPLITS
JOBS = ("train", "sample", "prepare")  # performance.job.WHAT
