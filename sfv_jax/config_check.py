"""Check of a whole config before anything is loaded: the table of `config_rules`, then relations between fields."""

import difflib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sfv_jax import config as configs
from sfv_jax.choices import is_there
from sfv_jax.config import ConfigDict, ConfigError
from sfv_jax.config_rules import ADVERSARIAL, DISCRIMINATOR, GENERAL, METHODS, OPTIMIZER, OWN_FIELDS, RULES, prefixed
from sfv_jax.errors import UserError
from sfv_jax.runtime.plain_config import flat

if TYPE_CHECKING:
    from sfv_jax.data.worlds import World

WITH_HEADS = ("sfv", "ladd", "ufogen")
OPTIMIZERS = ("generator_optimizer", "heads_optimizer")
PATHS = ("init", "encoders", "backbone_init", "decoder.init", "data.path")
LONGEST_PATTERN = 1000  # characters


def check(config: ConfigDict) -> None:
    """Checks all values of a config; loads nothing and builds no network.

    Raises:
      ConfigError: if any is illegal; lists every one with its legal values.
    """
    fields = flat(config.to_dict()) | _misplaced(config.to_dict())
    wrong = _problems(fields)
    sound = {name: value for name, value in fields.items() if name not in wrong}
    lines = [
        *wrong.values(),
        *_missing(fields, sound.get("method")),
        *_contradictions(sound),
        *_impossible_sections(config, sound, wrong),
    ]
    _refuse(lines)


def check_paths(config: ConfigDict) -> None:
    """Checks that the files and folders exist that a config names; models in the package have names instead.

    Raises:
      ConfigError: if any is missing; lists every one.
    """
    fields = flat(config.to_dict())
    named = {name: fields.get(name) for name in PATHS if not (name == "data.path" and fields["data.source"] == "world")}
    _refuse(
        [
            f"{name}={path}: there is no such file or folder"
            for name, path in named.items()
            if path and not is_there(path)
        ]
    )


def check_fields(fields: dict[str, Any]) -> None:
    """Checks the values of some flat fields by the table alone.

    Raises:
      ConfigError: as `check`.
    """
    _refuse([*_problems(fields).values()])


def checked_world(rules: dict[str, Any]) -> "World":
    """Returns the procedural world of recorded rules, the `data.world` of a config.

    Raises:
      ConfigError: if one is illegal.
    """
    check_fields(flat({"data": {"world": rules}}))
    return configs.world_of(ConfigDict({"data": {"world": rules}}))


def _refuse(lines: list[str]) -> None:
    if len(lines) == 1:
        raise ConfigError(f"config.{lines[0]}")
    if lines:
        raise ConfigError(f"the config has {len(lines)} mistakes:" + "".join(f"\n  config.{line}" for line in lines))


def _problems(fields: dict[str, Any]) -> dict[str, str]:
    return {name: line for name, value in fields.items() if (line := _problem(name, value))}


def _misplaced(config: dict, prefix: str = "") -> dict[str, Any]:
    """Returns `{"a.b": section}` of the sections that stand where a single value belongs; they may be empty."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and prefix + name in RULES:
            found[prefix + name] = value
        elif isinstance(value, dict):
            found |= _misplaced(value, f"{prefix}{name}.")
    return found


def _problem(name: str, value: object) -> str | None:
    rule = RULES.get(name)
    if rule is None and any(field.startswith(f"{name}.") for field in RULES):
        return f"{name}={_short(value)}: give a section of fields"
    if rule is None:
        near = difflib.get_close_matches(name, RULES, 1)
        return f"{name}={_short(value)}: no such field" + (f"; did you mean {near[0]}?" if near else "")
    if rule.allows(value):
        return None
    return f"{name}={_short(value)}: {'choose' if rule.among and rule.length is None else 'give'} {rule.legal}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _missing(fields: dict[str, Any], method: str | None) -> Iterator[str]:
    """Yields a line if a config lacks fields that its method needs; None: an unknown method."""
    wanted = set(GENERAL)
    if method is not None:
        wanted |= prefixed(method, METHODS[method]).keys()
        for section in OPTIMIZERS[: 1 + (method in WITH_HEADS)]:
            name = fields.get(f"{section}.name")
            others = {field for own in OWN_FIELDS.values() for field in own}.difference(OWN_FIELDS.get(str(name), ()))
            wanted |= {f"{section}.{field}" for field in OPTIMIZER if field not in others}
    if method in WITH_HEADS:
        wanted |= prefixed("discriminator", DISCRIMINATOR).keys() | ADVERSARIAL.keys()
    absent = sorted(wanted - fields.keys())
    absent = [name for name in absent if not any(name.startswith(f"{parent}.") for parent in fields)]
    if absent:
        some = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if absent[5:] else "")
        yield f"method={method!r}: fields are missing: {some}; start from the functions of sfv_jax/config.py"


def _contradictions(fields: dict[str, Any]) -> Iterator[str]:
    """Yields a line for each relation of `RELATIONS` that does not hold; those of absent fields do."""
    for names, relation in RELATIONS:
        if all(name in fields for name in names):
            try:
                relation(*(fields[name] for name in names))
            except UserError as error:
                yield f"{names[0]}={_short(fields[names[0]])}: {error}"


def _schedule(name: str, decay_steps: int) -> None:
    if (name == "constant") != (decay_steps == 0):
        raise UserError(f"does not go with decay_steps={decay_steps}: 0 for constant, a length for the others")


def _pattern(pattern: str) -> None:
    if not 0 < len(pattern) <= LONGEST_PATTERN:
        raise UserError(f"give 'all', 'temporal', 'spatial' or parts of paths, up to {LONGEST_PATTERN} characters")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"not a regular expression: {error}") from error


def _pairs(gan_loss: str, shared_noise: bool, name: str) -> None:
    if gan_loss == "relativistic" and not shared_noise:
        raise UserError(f"compares real and fake at one noise: set {name}.shared_noise=True")


def _losses(adversarial: float, second: float) -> None:
    if not adversarial and not second:
        raise UserError("and recon_weight=0: the generator has no loss; give one of them a weight")


def _balance(target: float, adversarial: float, second: float) -> None:
    if target and not (adversarial and second):
        raise UserError("needs both losses: give adv_weight and recon_weight above 0, or set balance=0")


def _lazy(penalties: int, heads: int) -> None:
    if penalties > 1 and penalties % heads:
        raise UserError(f"give a multiple of heads_every={heads}: in other steps the heads are not updated")


def _band(low: float, high: float) -> None:
    if low and high and low >= high:
        raise UserError(f"leaves no room below max_adv_to_rec={high}")


def _law(mean: float, std: float, levels: int) -> None:
    from sfv_jax.diffusion import edm

    if std:
        edm.lognormal_levels(levels, mean, std)


def _spread(std: float) -> None:
    if not std:
        raise UserError("give a magnitude above 0")


def _probabilities(given: tuple, levels: int) -> None:
    _one_together(given, given)
    if len(given) > levels:
        raise UserError(f"generator_levels={levels} are fewer than the {len(given)} probabilities")


def _probability_of_each(given: tuple, levels: int) -> None:
    if given:
        _one_together(given, (0,) * (levels - 1))


def _one_together(given: tuple, like: tuple) -> None:
    if len(given) != len(like) or abs(sum(given) - 1) > 1e-6:
        raise UserError("one probability for each level, 1 together")


def _guidance(guidance: tuple) -> None:
    from sfv_jax.diffusion.solvers import guidance_ramp

    guidance_ramp(guidance, 2)


def _some_loss(*weights: float) -> None:
    if not any(weights):
        raise UserError("and every other weight of decoder is 0, so nothing is learned: give a loss a weight")


def _sampling(steps: int, sampler: str) -> None:
    from sfv_jax.diffusion.solvers import SAMPLERS

    SAMPLERS[sampler].sigmas(steps)


RELATIONS: list[tuple[tuple[str, ...], Callable]] = [
    (("trainable",), _pattern),
    *(((f"{section}.schedule", f"{section}.decay_steps"), _schedule) for section in OPTIMIZERS),
    *(
        ((f"{name}.gan_loss", f"{name}.shared_noise"), lambda loss, shared, name=name: _pairs(loss, shared, name))
        for name in WITH_HEADS
    ),
    *(((f"{name}.adv_weight", f"{name}.recon_weight"), _losses) for name in WITH_HEADS),
    *(((f"{name}.balance", f"{name}.adv_weight", f"{name}.recon_weight"), _balance) for name in WITH_HEADS),
    *(((f"{name}.r1_every", f"{name}.heads_every"), _lazy) for name in WITH_HEADS),
    (("alarms.min_adv_to_rec", "alarms.max_adv_to_rec"), _band),
    (("sfv.probabilities", "sfv.generator_levels"), _probability_of_each),
    *(((f"{name}.p_mean", f"{name}.p_std", f"{name}.discriminator_levels"), _law) for name in ("sfv", "ladd")),
    *(((f"{name}.p_std",), _spread) for name in ("sfv", "ladd")),
    (("ladd.probabilities", "ladd.generator_levels"), _probabilities),
    (("ladd.warmup_probabilities", "ladd.probabilities"), _one_together),
    (("ladd.teacher_guidance",), _guidance),
    (("animatelcm.sample_steps", "animatelcm.sampler"), _sampling),
    (tuple(f"decoder.{name}_weight" for name in ("l1", "flicker", "feature", "real", "adv")), _some_loss),
]


def _impossible_sections(config: ConfigDict, fields: dict[str, Any], wrong: dict[str, str]) -> Iterator[str]:
    """Yields a line for each section whose legal values contradict each other, as the class built from it finds."""
    from sfv_jax.models.discriminator import DiscriminatorConfig

    sections: dict[str, Callable[[ConfigDict], Any]] = {
        "data.world": configs.world_of,
        "patch_codec": configs.patch_codec_of,
        "unet": configs.unet_of,
        "autoencoder": configs.vae_of,
        "discriminator": lambda config: DiscriminatorConfig(**config.discriminator),
    }
    built = {}
    for section, build in sections.items():
        if any(f"{name}.".startswith(f"{section}.") or section.startswith(f"{name}.") for name in wrong):
            continue
        if section in ("discriminator", "autoencoder") and section not in config:
            continue
        try:
            built[section] = build(config)
        except UserError as error:
            yield f"{section}: " + str(error).removeprefix(f"config.{section}: ")
        except AttributeError:
            yield f"{section}: the section is missing"
    if (
        fields.get("init")
        or fields.get("encoders")
        or fields.get("method") == "vae"
        or not {"data.world", "patch_codec", "unet"} <= built.keys()
    ):
        return  # the model decides
    unet, world, codec = built["unet"], built["data.world"], built["patch_codec"]
    if unet.in_channels != 2 * unet.out_channels:
        yield f"unet.in_channels={unet.in_channels}: latents and condition have twice {unet.out_channels} channels"
    for name in ("patch", "embed_cell"):
        side = getattr(codec, name)
        if fields.get("data.source") == "world" and world.size % side:
            yield f"data.world.size={world.size}: a multiple of patch_codec.{name}={side}; {nearest(world.size, side)}"


def nearest(value: int, step: int) -> str:
    """Returns the multiples of `step` around `value`, as text."""
    lower = value // step * step
    return f"nearest: {lower} and {lower + step}" if lower else f"nearest: {step}"
