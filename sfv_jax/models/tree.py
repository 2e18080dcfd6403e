"""Conversions between NNX modules and plain trees: nested dicts of arrays with string keys.

The trees hold all state; a module is the structure around it.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Params = dict  # nested dict[str, Params | jax.Array]
Module = TypeVar("Module", bound=nnx.Module)


class _Keys:
    """Stand-in for `nnx.Rngs` in our modules: one key per parameter, counted in Python.

    nnx.Rngs counts in a traced variable, with which abstract initialization of the full UNet takes half a minute.
    """

    def __init__(self, seed: int | jax.Array):
        self.key, self.used = seed if isinstance(seed, jax.Array) else jax.random.key(seed), 0

    def params(self) -> jax.Array:
        self.used += 1
        return jax.random.fold_in(self.key, self.used)


def _plain(tree) -> Params:
    return {str(k): _plain(v) if isinstance(v, dict) else v for k, v in tree.items()}


def abstract(module: Callable[..., Module], config, **kw) -> tuple[nnx.GraphDef[Module], Params]:
    """Returns the graph definition and the parameter shapes of `module(config, **kw)`; allocates nothing.

    Returns:
      graphdef: the structure from which `build(graphdef, params)` makes the module.
      params: nested dict of `jax.ShapeDtypeStruct`.
    """
    graphdef, params = _abstract(module, config, tuple(sorted(kw.items())))
    return graphdef, jax.tree.map(lambda shape: shape, params)  # a copy: callers may change theirs


@functools.lru_cache(maxsize=32)  # a command makes the same networks several times; the full UNet takes seconds
def _abstract(module, config, kw: tuple) -> tuple:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, **dict(kw), rngs=_Keys(0))))
    return graphdef, _plain(nnx.to_pure_dict(state))


def build(graphdef: nnx.GraphDef[Module], params: Params) -> Module:
    """Returns the module of `graphdef` with the arrays `params`.

    nnx.merge takes the leaves in the order of their sorted keys. As strings, "10" sorts before "2"; so list indices
    become integers again, or the layers of a list of more than ten would change places.
    """
    return nnx.merge(graphdef, _numbered(params))


def _numbered(tree: Params) -> dict:
    return {int(k) if k.isdigit() else k: _numbered(v) if isinstance(v, dict) else v for k, v in tree.items()}


def init(module: Callable[..., nnx.Module], config, seed: int | jax.Array = 0, **kw) -> Params:
    """Returns fresh parameters of `module(config, **kw)` as a nested dict; run it under `jit` to initialize sharded.

    `seed` is a whole number or a random key.
    """
    return _plain(nnx.to_pure_dict(nnx.state(module(config, **kw, rngs=_Keys(seed)))))


def flatten(params: Params, prefix: str = "") -> dict[str, jax.Array]:
    """Returns `{"down_blocks.0.resnets.0.conv1.kernel": array, ...}`, in tree order."""
    flat = {}
    for k, v in params.items():
        flat.update(flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten`."""
    params: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = params
        for k in parents:
            node = node.setdefault(k, {})
        node[leaf] = value
    return params


def subtree(params: Params, like: Params) -> Params:
    """Returns the part of `params` whose paths are in `like`, such as the backbone out of a whole network.

    Raises:
      KeyError: if `params` lacks a path of `like`; names the first missing key.
    """
    return {k: subtree(params[k], v) if isinstance(v, dict) else params[k] for k, v in like.items()}


def merge(params: Params, part: Params) -> Params:
    """Returns `params` with the leaves of `part`, a tree of some of its paths, in place of its own."""
    return {k: v if k not in part else merge(v, part[k]) if isinstance(v, dict) else part[k] for k, v in params.items()}


def select(params: Params, pattern: str) -> Params:
    """Returns the part of `params` whose dotted paths contain a match of the regular expression `pattern`."""
    return unflatten({k: v for k, v in flatten(params).items() if re.search(pattern, k)})


def count(params: Params) -> int:
    """Returns the number of parameters in a tree of arrays or shapes."""
    return sum(x.size for x in jax.tree.leaves(params))
