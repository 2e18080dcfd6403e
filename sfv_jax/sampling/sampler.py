"""Images to videos: `Sampler` owns the parameters of a generator and its codec."""

from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sfv_jax.checkpoints.base import Base, load_generator
from sfv_jax.checkpoints.decoders import choose_decoder
from sfv_jax.checkpoints.model_folder import ModelFolder
from sfv_jax.errors import UserError
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec, SVDCodec, augmentation_noise
from sfv_jax.models.decoders import finite
from sfv_jax.models.networks import DTYPES
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.sharding import on_mesh, param_shardings
from sfv_jax.sampling.extension import Extension
from sfv_jax.sampling.generator import Generator, share
from sfv_jax.sampling.inputs import check_side, checked_images, checked_seeds, fitting_size, resize
from sfv_jax.sampling.soundness import require_finite
from sfv_jax.sampling.stages import Enter, Stages, Watch, timed

Array = jax.Array
# Kinds of calls whose programs a process keeps. On a CPU the programs of one take about 350 memory maps, and Linux
# allows a process 65,530.
MOST_KINDS = 64


class Sampler:
    """Function from images to videos. Load it once and call it many times: each shape is compiled once.

    Programs are kept for `MOST_KINDS` shapes and numbers of steps; the next kind clears JAX's memory of all programs of
    the process. What is needed again is then compiled, or read from the cache of compiled programs.

    Attributes:
      unet: config of the generator; videos have `unet.num_frames` frames by default.
      params: UNet parameters.
      codec: converts images to conditions, and latents to frames.
      dtype: compute dtype of the UNet, one of `networks.DTYPES`.
      step: number of training steps of the checkpoint; None for a model folder.
      trained_size: (height, width) in pixels of the videos that the model was trained on, the default of its videos;
        None if unknown, as for a converted SVD.
      noise_aug_strength: default deviation of the noise on the image, for pixels in [-1, 1]: SVD's 0.02, and 0 for
        models of the procedural world, which were trained without it.
      decoder: description of the decoder of frames for records: "full", or that of a tiny decoder.
      model: the model folder that contains the VAE and CLIP tower; None with the patch codec.
      mesh: devices that share batch and parameters; None for one device. The caller places `params` and the codec's
        parameters (`load` does it); the sampler places batches.
      check_finite: raise NonFiniteError instead of returning videos computed from NaN or infinity. The check runs on
        the device; its result is read with the frames.
    """

    step: int | None = None
    trained_size: tuple[int, int] | None = None
    noise_aug_strength: float = 0.02
    decoder: str | dict[str, Any] = "full"
    model: ModelFolder | None = None

    def __init__(
        self,
        unet: UNetConfig,
        params: tree.Params,
        codec: SVDCodec | PatchCodec,
        dtype: str = "float32",
        *,
        mesh: Mesh | None = None,
        check_finite: bool = True,
    ):
        self.unet, self.params, self.codec, self.dtype = unet, params, codec, dtype
        self.mesh, self.check_finite = mesh, check_finite
        self.generator = Generator(unet, dtype, mesh)
        self._finite = jax.jit(finite)
        self._kinds: set[tuple] = set()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        vae_dtype: str = "float32",
        decode_pixels: int | None = None,
        mesh: Mesh | None = None,
        raw: bool = False,
        check_finite: bool = True,
        decoder: str | Path = "full",
    ) -> "Sampler":
        """Loads a model folder (made by `python -m sfv_jax.convert`), or the newest checkpoint of a training run.

        Args:
          path: model folder, or workdir of a run.
          dtype: dtype of the UNet's parameters and computations, one of `networks.DTYPES`. Noise, latents and the
            sampler's arithmetic are always fp32.
          vae_dtype: compute dtype of the decoder; the VAE's encoder and CLIP are always fp32.
          decode_pixels: pixels that a device decodes at a time, over all frames, 0 for all; the frames are the same.
            Default: all if memory suffices, else 2^18.
          mesh: a mesh of `sharding.make_mesh`. Batches are split over `data` and `fsdp`, parameters over `fsdp`.
          raw: load the trained weights instead of their moving average (workdirs only).
          check_finite: see the class.
          decoder: "full": the VAE's decoder. "tiny": the tiny decoder in the model folder. Or the file or folder of a
            tiny decoder, or the workdir of its training.

        Raises:
          WeightsError: if `path` is neither a model folder nor a workdir, or `decoder` no decoder of its latents.
          WorkdirError: if the run has no checkpoint yet.
          UserError: if a dtype is unknown, `decode_pixels` is negative, or options of a decoder are given for the patch
            codec.
        """
        for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            if value not in DTYPES:
                raise UserError(f"{name} {value!r}: choose one of {', '.join(DTYPES)}")
        place = None if mesh is None else partial(param_shardings, mesh)
        base = load_generator(path, raw=raw, place=place, dtype=DTYPES[dtype])
        codec, tiny = base.codec, choose_decoder(str(decoder), base)
        if isinstance(codec, SVDCodec):
            weights = codec.params | ({"tiny_decoder": jax.tree.map(jnp.asarray, tiny.params)} if tiny else {})
            weights = weights if place is None else jax.device_put(weights, place(weights))
            options: dict[str, Any] = dict(decode_dtype=DTYPES[vae_dtype], pixels=decode_pixels)
            options["tiny"] = tiny and tiny.config
            codec = SVDCodec(codec.vae_config, codec.clip_config, weights, **options)
        elif vae_dtype != "float32" or decode_pixels is not None:
            option = f"vae_dtype {vae_dtype!r}" if decode_pixels is None else f"decode_pixels {decode_pixels}"
            raise UserError(f"{option}: {path} has the patch codec, which has no decoder network")
        sampler = cls(base.unet, base.params, codec, dtype, mesh=mesh, check_finite=check_finite)
        sampler.step, sampler.trained_size, sampler.model = base.step, base.size, base.model
        sampler.decoder = tiny.record() if tiny else "full"
        sampler.noise_aug_strength = 0.0 if base.world else 0.02
        return sampler

    def with_decoder(self, decoder: str | Path) -> "Sampler":
        """Returns the same sampler, parameters and compiled programs included, with another decoder of frames.

        Args:
          decoder: as for `load`.

        Raises:
          WeightsError: as `load`.
        """
        tiny = choose_decoder(str(decoder), Base(self.unet, self.params, self.codec, self.model, self.step))
        other = copy(self)
        other.decoder = tiny.record() if tiny else "full"
        if isinstance(self.codec, SVDCodec):
            params = jax.tree.map(jnp.asarray, tiny.params) if tiny else None
            if params is not None and self.mesh is not None:
                params = jax.device_put(params, param_shardings(self.mesh, params))
            other.codec = self.codec.with_decoder(tiny.config if tiny else None, params)
        return other

    def latents(self, condition: dict, noise: Array, **options) -> Array:
        """Returns `generator(params, condition, noise, ...)`: scaled latents fp32 `[b, t, h, w, c]`."""
        return self.generator(self.params, condition, noise, **options)

    def condition(
        self,
        images: Sequence[np.ndarray],
        size: tuple[int, int],
        keys: Array | None,
        ids: Sequence[float],
        noise: Array | None = None,
    ) -> dict:
        """Returns the conditions of videos, as `Generator` takes them.

        Args:
          images: uint8 `[h, w, 3]` each, of any sizes; resized without cropping.
          size: `(height, width)` of the videos.
          keys: `[b]` typed keys of the pixel noise; unused if `noise` is given.
          ids: `(fps - 1, motion_bucket_id, noise_aug_strength)`.
          noise: `[b, height, width, 3]` standard normal in place of noise from `keys`; scaled by `noise_aug_strength`.

        Raises:
          UserError: if an image has another shape or dtype.
        """
        images = checked_images(images)
        return self._condition(self._embed(images, size), self._cond_latent(images, size, keys, ids[2], noise), ids)

    def __call__(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        *,
        steps: int = 1,
        sampler: str = "euler",
        seed: int | Sequence[int] = 0,
        noise: Array | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fit: str = "stretch",
        fps: float = 7,
        motion_bucket_id: float = 127,
        noise_aug_strength: float | None = None,
        guidance: tuple[float, float] | None = None,
        decode_chunk_size: int | None = None,
        times: dict[str, float] | None = None,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Returns videos uint8 `[b, t, height, width, 3]`, one per image.

        Args:
          images: uint8 `[h, w, 3]` each.
          steps: calls of the UNet; 1 is one forward pass from sigma 700, the same with every sampler.
          sampler: "euler": SVD's deterministic sampler, any number of steps. "sfv": for SF-V generators, up to 3 steps
            at their training levels 700, 70.54, 2.269, with fresh noise in between as in training. "sfv_euler": the
            same levels without fresh noise. "animatelcm": for AnimateLCM, up to 40 steps, with fresh noise in between.
          seed: seed of the first image, with seeds of the next ones counting up; or one seed per image. A video depends
            only on its own seed.
          noise: `[b, t, height / d, width / d, c]` standard normal start in place of noise from the seed, with the
            codec's downscale d. The fresh noise of later steps still comes from the seed.
          num_frames: frames per video; default: `unet.num_frames`.
          height, width: pixels, multiples of d (8 for SVD). SVD was trained at multiples of 64; at other sizes the
            UNet's levels are resized to fit, exactly as in diffusers. Default: as `size` says for the first image.
          fit: how images of another shape are brought to height x width, see `data.images.fitted`. "stretch" is what
            diffusers does: the VAE gets the stretched image, CLIP the original. With "crop" and "pad" both get the
            same picture, as in training caches.
          fps, motion_bucket_id, noise_aug_strength: SVD's micro-conditions; the model receives fps - 1. The default of
            the last is the sampler's.
          guidance: first and last weight of the ramp over frames, e.g. (1.0, 3.0) for SVD; None for no guidance.
          decode_chunk_size: frames decoded at a time, default all; chunks change the result of the VAE's decoder, see
            `SVDCodec.decode`.
          times: receives the seconds of the stages "clip", "encode", "denoise", "decode", with compilation, if any.
            Without it, the host does not wait for the device between stages.
          watch: shows the progress of several steps, and of frames decoded in chunks, such as `progress.progress`; then
            compilations are said, too. Pixels may differ by rounding from those without it.

        Raises:
          UserError: if an image is no uint8 `[h, w, 3]`, the codec cannot represent the size, seeds do not match the
            images or are too large, or options are impossible.
          NonFiniteError: if a stage returns NaN or infinity, see `check_finite`.
        """
        images = checked_images(images)
        stage = Stages(self.mesh, times, watch)
        latents, checks = self._denoised(
            images,
            stage,
            decode_chunk_size,
            steps=steps,
            sampler=sampler,
            seed=seed,
            noise=noise,
            num_frames=num_frames,
            height=height,
            width=width,
            fit=fit,
            ids=(fps - 1, motion_bucket_id, self._strength(noise_aug_strength)),
            guidance=guidance,
        )
        t = latents.shape[1]
        chunks = isinstance(self.codec, SVDCodec) and (decode_chunk_size or t) < t
        with stage.watched(t if chunks else 1, "decoded frames") as advance:
            more = (advance,) if advance else ()
            frames, sound = stage("decode", self.codec.decode_checked, latents, decode_chunk_size, *more)
        frames = np.asarray(frames)[: len(images)]
        if self.check_finite:
            self._require_finite(checks | {"decoded frames": sound}, len(images))
        return frames

    def extend(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        extension: int | Extension,
        *,
        seed: int | Sequence[int] = 0,
        num_frames: int | None = None,
        times: dict[str, float] | None = None,
        **options,
    ) -> np.ndarray:
        """Returns longer videos uint8 `[b, t + n (t - 1), height, width, 3]`: n chunks of t frames follow the first.

        The first t frames are those of the same call of the sampler. The last frame of a chunk is the image of the
        next one, whose first frame repeats it and is left out. All chunks are made by the same programs; only images
        of another size than the videos' are embedded by a program of their own in the first chunk.

        Args:
          images: as for `__call__`.
          extension: n, or the n, noise and color of an `Extension`.
          seed: as for `__call__`. Those of further chunks follow from it, see `Extension.seeds`.
          num_frames: t; default: `unet.num_frames`.
          times: receives the seconds of the stages over all chunks.
          options: other arguments of `__call__`. Start noise is that of the first chunk.

        Raises:
          UserError: as `__call__`, or if a video of one frame is to be extended.
          NonFiniteError: as `__call__`.
        """
        images = checked_images(images)
        extension = extension if isinstance(extension, Extension) else Extension(extension)
        extension.length(num_frames or self.unet.num_frames)
        seeds = checked_seeds(seed, len(images))

        def call(images: Sequence[np.ndarray], **options) -> Iterator[np.ndarray]:
            own: dict[str, float] | None = None if times is None else {}
            yield from np.moveaxis(self(images, num_frames=num_frames, times=own, **options), 1, 0)
            if times is not None and own is not None:
                times.update({name: times.get(name, 0) + seconds for name, seconds in own.items()})

        return np.stack(list(extension.frames(call, images, seeds, options)), axis=1)

    def stream(
        self,
        image: np.ndarray,
        *,
        steps: int = 1,
        sampler: str = "euler",
        seed: int = 0,
        noise: Array | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fit: str = "stretch",
        fps: float = 7,
        motion_bucket_id: float = 127,
        noise_aug_strength: float | None = None,
        guidance: tuple[float, float] | None = None,
        times: dict[str, float] | None = None,
        watch: Watch | None = None,
        enter: Enter | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the frames uint8 `[height, width, 3]` of the video of `image`, each as soon as it is decoded.

        A tiny decoder decodes one frame after another, in one compiled step. The VAE's decoder mixes all frames, so
        with it they come together, after all are decoded. While the caller works on a frame, the device may decode the
        next one.

        Args:
          image: uint8 `[h, w, 3]`.
          noise: `[1, t, height / d, width / d, c]`, see `__call__`.
          steps, sampler, seed, num_frames, height, width, fit, fps, motion_bucket_id, noise_aug_strength, guidance,
            watch: as for `__call__`.
          times: as for `__call__`. "decode" grows with each frame, without the time that the caller takes.
          enter: called before each stage with its name, see `times`, and whether it may have to be compiled first. What
            it raises ends the call.

        Raises:
          UserError: as `__call__`.
          NonFiniteError: as `__call__`; for decoded frames, in place of the first of them that is not finite.
        """
        stage = Stages(self.mesh, times, watch, enter)
        latents, checks = self._denoised(
            checked_images([image]),
            stage,
            "stream",
            steps=steps,
            sampler=sampler,
            seed=seed,
            noise=noise,
            num_frames=num_frames,
            height=height,
            width=width,
            fit=fit,
            ids=(fps - 1, motion_bucket_id, self._strength(noise_aug_strength)),
            guidance=guidance,
        )
        if self.check_finite:
            self._require_finite(checks, 1)
        stage.enter("decode", stage.new)
        return self._streamed(latents) if times is None else timed(self._streamed(latents), times)

    def _streamed(self, latents: Array) -> Iterator[np.ndarray]:
        coming = self.codec.stream(latents)
        following = (next if self.mesh is None else on_mesh(self.mesh, next))(coming, None)
        while following is not None:
            frame, sound = following
            following = (next if self.mesh is None else on_mesh(self.mesh, next))(coming, None)  # begins the next one
            frame = np.asarray(frame)[0]
            if self.check_finite:
                self._require_finite({"decoded frames": sound}, 1)
            yield frame

    def _denoised(
        self,
        images: list[np.ndarray],
        stage: Stages,
        decoding: int | str | None,
        *,
        steps: int,
        sampler: str,
        seed: int | Sequence[int],
        noise: Array | None,
        num_frames: int | None,
        height: int | None,
        width: int | None,
        fit: str,
        ids: tuple[float, float, float],
        guidance: tuple[float, float] | None,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the scaled latents of the videos of `images`, and whether each stage's results were finite.

        Args:
          images: checked images.
          stage: the stages of the call.
          decoding: how the latents will be decoded; kinds of calls differ in it.
          ids: `(fps - 1, motion_bucket_id, noise_aug_strength)`.
          steps, sampler, seed, noise, num_frames, height, width, fit, guidance: as for `__call__`.
        """
        checks: dict[str, Array] = {}

        def checked(name: str, result: Array) -> Array:
            if self.check_finite:
                checks[name] = self._finite(result)
            return result

        count, size = len(images), self.size(images[0].shape[:2], height, width)
        if fit != "stretch":
            from sfv_jax.data.images import fitted

            images = [fitted(image, *size, fit) for image in images]
        seeds = checked_seeds(seed, count)
        shape = self.latent_shape(size, num_frames)
        if noise is not None and noise.shape != (count, *shape):
            raise UserError(f"noise has shape {noise.shape}, these images need {(count, *shape)}")
        stage.about, stage.steps = f"{shape[0]} frames of {size[0]}x{size[1]}", steps
        stage.new = self._keep_room(
            (shape, steps, sampler, guidance is None, decoding, *(image.shape for image in images))
        )
        rows = self._rows(count)
        images, seeds = [images[n] for n in rows], [seeds[n] for n in rows]
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(jnp.stack([jax.random.key(s) for s in seeds]))
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys[:, 1]) if noise is None else noise[rows]

        embed = checked("CLIP embedding", stage("clip", self._embed, images, size))
        latent = stage("encode", self._cond_latent, images, size, keys[:, 0], ids[2])
        condition = self._condition(embed, checked("conditioning latent", latent), ids)
        options = dict(steps=steps, guidance=guidance, sampler=sampler, keys=keys[:, 2])
        with stage.watched(steps, "sampling steps") as advance:
            denoised = stage("denoise", self.latents, condition, noise, **options, advance=advance)
        return checked("denoised latents", denoised), checks

    def _keep_room(self, kind: tuple) -> bool:
        """Notes a kind of call; forgets all programs before there are more than `MOST_KINDS`. Returns if it is new."""
        new = kind not in self._kinds
        if new and len(self._kinds) >= MOST_KINDS:
            jax.clear_caches()
            self._kinds.clear()
        self._kinds.add(kind)
        return new

    def latent_shape(self, size: tuple[int, int], num_frames: int | None = None) -> tuple[int, int, int, int]:
        """Returns `(t, h, w, c)`, the shape of one video's latents, for `size (height, width)` in pixels."""
        down = self.codec.downscale
        return num_frames or self.unet.num_frames, size[0] // down, size[1] // down, self.codec.latent_channels

    def size(self, image: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
        """Returns `(height, width)` of the video of an image of the size `image`, in whole latent cells.

        A side is as given, or else that of `trained_size`. If neither is known, the video has the shape of the image
        and at most the area that the UNet's config names (`fitting_size`).

        Raises:
          UserError: if a given number is not a multiple of the codec's downscale.
        """
        down = self.codec.downscale
        own_height, own_width = self.trained_size or fitting_size(image, self.unet.sample_size, down)
        size = (height or own_height, width or own_width)
        for name, n in zip(("height", "width"), size, strict=True):
            check_side(name, n, down)
        return size

    def _embed(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> Array:
        # CLIP embeds the original, as in diffusers; the patch codec's embedding is defined at the size of the video.
        patches = isinstance(self.codec, PatchCodec)
        originals = [resize(image, size) for image in images] if patches else images
        alike = len({image.shape for image in originals}) == 1
        groups = [originals] if alike else [[image] for image in originals]
        embed = jnp.concatenate([self.codec.embed(share(self.mesh, np.stack(group))) for group in groups])
        if embed.shape[-1] != self.unet.cross_attention_dim:
            raise UserError(
                f"images of {size[0]}x{size[1]} are embedded in {embed.shape[-1]} numbers, the UNet takes "
                f"{self.unet.cross_attention_dim}: use the size the model was trained at"
            )
        return embed

    def _cond_latent(self, images, size: tuple[int, int], keys, strength: float, noise: Array | None = None) -> Array:
        resized = np.stack([resize(image, size) for image in images])
        noise = augmentation_noise(keys, resized.shape[1:]) if noise is None else noise
        resized, noise = share(self.mesh, (resized, noise))
        return self.codec.encode_image(resized, noise, strength)

    @staticmethod
    def _condition(embed: Array, latent: Array, ids: Sequence[float]) -> dict:
        return {"cond_latent": latent, "image_embed": embed, "ids": jnp.tile(jnp.float32(ids), (len(embed), 1))}

    def _rows(self, count: int) -> np.ndarray:
        """Returns indices that extend a batch with copies of its last sample until the mesh divides it."""
        parts = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return np.minimum(np.arange(-(-count // parts) * parts), count - 1)

    def _require_finite(self, checks: dict[str, Array], count: int) -> None:
        decoder = getattr(self.codec, "decoder", None)
        dtype = jnp.dtype(getattr(self.codec, "decode_dtype", jnp.float32)).name
        require_finite(checks, count, self.dtype, (decoder.title if decoder else "codec", dtype))

    def _strength(self, given: float | None) -> float:
        return self.noise_aug_strength if given is None else given
