"""Writes docs/configuration.md from the defaults and the table of legal values.

python -m tests.support.configuration_page
"""

import dataclasses
from pathlib import Path

from sfv_jax import config as defaults
from sfv_jax import config_rules as rules
from sfv_jax.data.worlds import World
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.runtime.plain_config import flat

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
METHODS = tuple(rules.METHODS)
START = """# Config fields

Made from `sfv_jax/config.py` (defaults, with sources) and `sfv_jax/config_rules.py` (legal values) by
`python -m tests.support.configuration_page`; a test compares.

`--config.FIELD=VALUE` sets a field of a file in `configs/`; so does a line of a config file of your own. All values are
checked before anything is loaded, and all mistakes are listed at once. Numbers are always finite. A run continues only
with the config it was started with, except for its length, its reports and its mesh. Fields that a recorded config
lacks because they are younger get the value that does what was done before.
"""
RELATIONS = """
## Relations

| fields | relation |
| --- | --- |
| `batch_size` | a multiple of `accumulation_steps` times `mesh.data` times `mesh.fsdp` |
| `mesh` | its product is the number of devices |
| `trainable` | finds a parameter, within seconds |
| `*_optimizer.decay_steps` | 0 for the schedule "constant", otherwise a length |
| `gan_loss` "relativistic" | needs `shared_noise=True` |
| `adv_weight`, `recon_weight` | not both 0; with `balance`, neither |
| `r1_every` | a multiple of `heads_every` |
| `alarms.min_adv_to_rec` | below `max_adv_to_rec`, unless one of them is 0 |
| `sfv.probabilities` | empty, or one for each level of the generator but the lowest, 1 together |
| `p_mean`, `p_std` | the law has mass at the discriminator's levels; `p_std` is not 0 |
| `ladd.probabilities` | at most `generator_levels`; as many `warmup_probabilities`; both 1 together |
| `ladd.teacher_guidance` | one end above 1, or both 1 |
| `animatelcm.sample_steps` | at most 3 with a sampler of SF-V, 40 with AnimateLCM's |
| `decoder.*_weight` | not all 0 but `r1_weight` |
| `decoder.block_out_channels` | as many as `layers_per_block`, and as the VAE has levels |
| `discriminator` | spatial heads, temporal heads, or both |
| `unet.block_out_channels` | as many as `num_attention_heads`, and divisible by them and by `norm_groups` |
| `unet.in_channels` | twice `out_channels` |
| `data.world` | `radii` in order and inside the frame; `size` a multiple of the codec's `patch` and `embed_cell` |
| networks | the state of training fits the memory of the devices, where they report it |
"""


def table(fields: dict[str, object], section: str = "") -> list[str]:
    """Returns the lines of a table with all `fields` of one section and their defaults."""
    prefix = f"{section}." if section else ""
    lines = ["", "| field | default | legal values | meaning |", "| --- | --- | --- | --- |"]
    for name, value in fields.items():
        rule = rules.RULES[prefix + name]
        lines.append(f"| `{prefix}{name}` | `{shown(value)}` | {rule.legal} | {rule.meaning} |")
    return lines


def shown(value: object) -> str:
    """Returns a default as it is written on the command line."""
    return repr(value).replace('"', "'")


def differing() -> list[str]:
    """Returns the lines of a table of general fields whose default depends on the method."""
    general = {name: flat(getattr(defaults, name)().to_dict()) for name in METHODS}
    common = flat(defaults.default().to_dict())
    names = [k for k in common if k != "method" and any(general[m][k] != common[k] for m in METHODS)]
    lines = ["", "| field | " + " | ".join(METHODS) + " |", "| --- |" + " --- |" * len(METHODS)]
    return lines + [f"| `{k}` | " + " | ".join(f"`{shown(general[m][k])}`" for m in METHODS) + " |" for k in names]


def optimizers() -> list[str]:
    """Returns the lines of a table of the optimizers' fields and defaults in each method."""
    lines = ["", "| field | default | legal values | meaning |", "| --- | --- | --- | --- |"]
    everything = {**defaults.muon(3e-5), **defaults.sm3(1e-5)}
    for name, rule in rules.OPTIMIZER.items():
        default = "see below" if name in ("name", "lr") else f"`{shown(everything[name])}`"
        lines.append(f"| `{name}` | {default} | {rule.legal} | {rule.meaning} |")
    lines += ["", "| section | " + " | ".join(METHODS) + " |", "| --- |" + " --- |" * len(METHODS)]
    for section in ("generator_optimizer", "heads_optimizer"):
        found = [getattr(defaults, name)().get(section) for name in METHODS]
        cells = [f"{s.name}, lr `{shown(s.lr)}`" if s else "none" for s in found]
        lines.append(f"| `{section}` | " + " | ".join(cells) + " |")
    return lines


def dataclass_fields(kind) -> dict[str, object]:
    """Returns the defaults of a dataclass."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def page() -> str:
    """Returns the text of docs/configuration.md."""
    common = {k: v for k, v in flat(defaults.default().to_dict()).items() if not k.startswith("unet.")}
    lines = [START, "## All methods", *table(common), "", "Defaults that depend on the method:", *differing()]
    lines += ["", "## Optimizers", "", "Fields of `generator_optimizer` and `heads_optimizer`.", *optimizers()]
    lines += ["", "## Discriminator", *table(defaults.sfv().discriminator.to_dict(), "discriminator")]
    lines += [f"| `{name}` | `''` | {rule.legal} | {rule.meaning} |" for name, rule in rules.ADVERSARIAL.items()]
    for name in METHODS:
        lines += ["", f"## {name}", *table(getattr(defaults, name)()[name].to_dict(), name)]
    changeable = ", ".join(f"`{name}`" for name in defaults.SAME_PARAMETERS)
    lines += ["", "## UNet", "", f"With `init`, only these may change: {changeable}."]
    lines += table(dataclass_fields(UNetConfig), "unet")
    vae = {k: v for k, v in dataclass_fields(VAEConfig).items() if k not in ("in_channels", "out_channels")}
    lines += ["", "## VAE", *table(vae, "autoencoder")]
    lines += ["", "## Procedural world", *table(dataclass_fields(World), "data.world")]
    lines += table(dataclass_fields(PatchCodec), "patch_codec")
    return "\n".join(lines) + "\n" + RELATIONS


if __name__ == "__main__":
    PAGE.write_text(page())
