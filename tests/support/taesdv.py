"""TAESDV's decoder in torch, stated from its published layout alone, and files of it in memory.

Layers are numbered as in the released file: 0 clamps to 3 tanh(x / 3), 1 is a convolution, 2 a ReLU, then blocks with
memory, each upsampling followed by a convolution without bias, and at last a convolution.
"""

from pathlib import Path

import numpy as np

from sfv_jax.models.tiny_decoder import TinyDecoderConfig
from sfv_jax.weights.reader import Tensor, Tensors
from tests.support.golden import noise


def decoder_shapes(config: TinyDecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a decoder's tensors by their released names."""
    widths, shapes, number = config.block_out_channels, {}, 1

    def conv(name: str, i: int, o: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (o, i, 3, 3)
        if bias:
            shapes[f"{name}.bias"] = (o,)

    conv("decoder.1", config.latent_channels, widths[0])
    number = 3
    blocks = [(config.mid_layers, widths[0], 1)]
    blocks += [(count, width, 2) for count, width in zip(config.layers_per_block, widths, strict=True)]
    for n, (count, width, inputs) in enumerate(blocks):
        if n > 1:
            conv(f"decoder.{number + 1}", widths[n - 2], width, bias=False)
            number += 2
        for _ in range(count):
            for layer, i in ((0, inputs * width), (2, width), (4, width)):
                conv(f"decoder.{number}.conv.{layer}", i, width)
            number += 1
    conv(f"decoder.{number}", widths[-1], config.out_channels)
    return shapes


def random_decoder(config: TinyDecoderConfig) -> dict[str, np.ndarray]:
    """Returns random weights by their released names, biases included; activations keep their size through layers."""
    return {
        name: np.float32(0.1 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5) * noise(n, *shape)
        for n, (name, shape) in enumerate(decoder_shapes(config).items())
    }


def in_memory(weights: dict[str, np.ndarray], path: str = "taesdv.safetensors") -> Tensors:
    """Returns an open file of these tensors that is not on disk."""
    entries = {
        name: Tensor(Path(path), value.shape, "F32", lambda value=value: value) for name, value in weights.items()
    }
    return Tensors((Path(path),), entries)


def torch_decode(weights: dict[str, np.ndarray], latents: np.ndarray) -> np.ndarray:
    """Returns frames `[b, t, H, W, 3]` of scaled `latents [b, t, h, w, c]`, frame by frame, in float64."""
    import torch
    from torch.nn import functional

    tensors = {name: torch.from_numpy(np.float64(value)) for name, value in weights.items()}
    numbers = sorted({int(name.split(".")[1]) for name in tensors})
    x = torch.from_numpy(np.float64(latents)).permute(1, 0, 4, 2, 3)
    memories: dict[int, torch.Tensor] = {}
    frames = []

    def conv(name: str, x):
        return functional.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), padding=1)

    for frame in x:
        y = 3 * torch.tanh(frame / 3)
        for n in numbers:
            if f"decoder.{n}.conv.0.weight" in tensors:
                own = y
                if tensors[f"decoder.{n}.conv.0.weight"].shape[1] == 2 * y.shape[1]:
                    y = torch.cat([own, memories.get(n, torch.zeros_like(own))], dim=1)
                    memories[n] = own
                for layer in (0, 2):
                    y = torch.relu(conv(f"decoder.{n}.conv.{layer}", y))
                y = torch.relu(conv(f"decoder.{n}.conv.4", y) + own)
            elif f"decoder.{n}.bias" in tensors:
                y = conv(f"decoder.{n}", y)
                y = torch.relu(y) if n == 1 else y
            else:
                y = conv(f"decoder.{n}", y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        frames.append(y)
    return torch.stack(frames, dim=1).permute(0, 1, 3, 4, 2).numpy()
