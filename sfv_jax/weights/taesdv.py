"""Weights of tiny decoders under the names of TAESDV (madebyollin/taesdv), and under ours.

TAESDV numbers the layers of one torch Sequential, those without weights included: `decoder.3.conv.0.weight` is the
first convolution of the first block. Its file also has an encoder, which decoding does not need.
"""

import re
from collections.abc import Iterator

import numpy as np

from sfv_jax.errors import UserError
from sfv_jax.models import tree
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.weights.diffusers import read_finite, their_name, their_shape, to_ours, to_theirs
from sfv_jax.weights.folders import WeightsError, shape_problems
from sfv_jax.weights.reader import FLOATS, Tensors
from sfv_jax.weights.writer import Shapes

CONVS = {"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}  # of a block
_NAME = re.compile(r"decoder\.(\d+)\.(conv\.0\.)?weight")
OTHERS = (  # layouts that are mistaken for TAESDV's: a pattern of names, and what has them
    (r"^(decoder\.)?\d+\.conv\.weight$", "TAEHV, which makes several frames of one latent of other VAEs"),
    (r"^(\d+\.|decoder\.layers\.|taesd_decoder\.)", "TAESD, a decoder of single images without memory"),
    (r"^decoder\.(conv_in|up_blocks|mid)\b", "a VAE"),
)


def layers(config: TinyDecoderConfig) -> Iterator[tuple[str, str]]:
    """Yields the name of each layer with weights in our module, and in TAESDV's numbering."""
    yield "conv_in", "decoder.1"  # 0 clamps, 2 is a ReLU
    number = 3

    def block(path: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{path}.{ours}", f"decoder.{number}.{theirs}") for ours, theirs in CONVS.items())

    for n in range(config.mid_layers):
        yield from block(f"mid_blocks.{n}")
        number += 1
    for n, count in enumerate(config.layers_per_block):
        for m in range(count):
            yield from block(f"up_blocks.{n}.blocks.{m}")
            number += 1
        if n < len(config.layers_per_block) - 1:
            yield f"up_blocks.{n}.upsampler.conv", f"decoder.{number + 1}"
            number += 2  # the upsampling, and its convolution
    yield "conv_out", f"decoder.{number}"


def taesdv_names(config: TinyDecoderConfig) -> dict[str, str]:
    """Returns TAESDV's name of each of our parameters."""
    theirs = dict(layers(config))
    _, shapes = tree.abstract(TinyTemporalDecoder, config)
    paths = [path.rpartition(".")[::2] for path in tree.flatten(shapes)]
    return {f"{layer}.{leaf}": f"{theirs[layer]}.{'weight' if leaf == 'kernel' else leaf}" for layer, leaf in paths}


def our_names(config: TinyDecoderConfig) -> dict[str, str]:
    """Returns the name of each of our parameters in our own files."""
    _, shapes = tree.abstract(TinyTemporalDecoder, config)
    return {path: their_name(path) for path in tree.flatten(shapes)}


def taesdv_config(tensors: Tensors) -> TinyDecoderConfig:
    """Returns the config of the decoder that a file has under TAESDV's names, from the shapes of its tensors.

    Raises:
      WeightsError: if the file has another layout.
    """
    shapes = {name: tensors.shape(name) for name in tensors.names()}
    for pattern, what in OTHERS:
        if any(re.search(pattern, name) for name in shapes):
            raise WeightsError(f"{tensors.where()} holds {what}: a TAESDV decoder is needed")
    found = [(int(match[1]), match[2], name) for name in shapes if (match := _NAME.fullmatch(name))]
    convs = {n: shapes[name] for n, layer, name in found if not layer}
    blocks = {n: shapes[name] for n, layer, name in found if layer}
    ends = sorted(n for n in convs if f"decoder.{n}.bias" in shapes)
    if len(ends) != 2 or not all(len(shape) == 4 for shape in (*convs.values(), *blocks.values())):
        raise WeightsError(f"{tensors.where()} holds no TAESDV decoder, which has decoder.1.weight")
    first, last = ends
    mid = [n for n, (o, i, *_) in blocks.items() if o == i]
    ups = [n for n in sorted(convs) if n not in ends]
    borders = [first, *ups, last]
    counts = [sum(a < n < b and n not in mid for n in blocks) for a, b in zip(borders, borders[1:], strict=False)]
    widths = (convs[first][0], *(convs[n][0] for n in ups))
    try:
        return TinyDecoderConfig(convs[first][1], convs[last][0], widths, tuple(counts), len(mid))
    except UserError as error:
        raise WeightsError(f"{tensors.where()} holds no TAESDV decoder: {error}") from error


def read_decoder(tensors: Tensors, names: dict[str, str], config: TinyDecoderConfig) -> tree.Params:
    """Returns the parameters of a decoder, fp32 arrays of numpy.

    Args:
      tensors: the file; tensors of an encoder are left out.
      names: the name of each of our parameters in the file.
      config: the decoder.

    Raises:
      WeightsError: if a tensor is missing, unexpected, misshapen, not floating or not finite.
    """
    _, expected = tree.abstract(TinyTemporalDecoder, config)
    wanted = {names[path]: their_shape(path, x.shape) for path, x in tree.flatten(expected).items()}
    found = {name: tensors.shape(name) for name in tensors.names() if not name.startswith("encoder.")}
    problems = shape_problems(found, wanted)
    problems += [f"not floating point: {name}" for name in found if tensors.dtype(name) not in FLOATS]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise WeightsError(f"{tensors.where()} is not such a tiny decoder: {problems[0]}{more}")
    dtype = np.dtype(np.float32)
    return tree.unflatten({path: to_ours(path, read_finite(tensors, name, dtype)) for path, name in names.items()})


def present(params: tree.Params, names: dict[str, str]) -> tuple[Shapes, list[tuple[str, np.ndarray]]]:
    """Returns the shapes and the tensors of a decoder under `names`, sorted, as `write_safetensors` takes them."""
    flat = tree.flatten(params)
    paths = sorted(flat, key=names.__getitem__)
    tensors = [(names[path], np.ascontiguousarray(to_theirs(path, np.asarray(flat[path])))) for path in paths]
    return {name: value.shape for name, value in tensors}, tensors
