"""Substitute for ml_collections.ConfigDict with only the features that the defaults need, and configs as flat dicts.

The substitute serves accelerator images that have only JAX and its dependencies, where nothing but the benchmark runs.
"""


class ConfigDict(dict):
    """Dict of fields that are both attributes and items.

    Raises:
      AttributeError: if a field that does not exist is read.
    """

    def __init__(self, fields=()):
        super().__init__()
        for name, value in dict(fields).items():
            self[name] = value

    def __setitem__(self, name: str, value) -> None:
        super().__setitem__(name, ConfigDict(value) if isinstance(value, dict) else value)

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no such config field: {name}") from None

    __setattr__ = __setitem__

    def update(self, changes=(), **more) -> None:
        """Sets fields; a dict for a nested field changes only the fields that it names."""
        for name, value in (dict(changes) | more).items():
            if isinstance(value, dict) and isinstance(self.get(name), ConfigDict):
                self[name].update(value)
            else:
                self[name] = value

    def to_dict(self) -> dict:
        """Returns the fields as plain dicts."""
        return {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in self.items()}

    def copy_and_resolve_references(self) -> "ConfigDict":
        """Returns a deep copy; there are no references."""
        return ConfigDict(self.to_dict())


def placeholder(kind: type) -> None:
    """Returns None, the value of a field that has none; ml_collections also keeps the type that it may be set to."""
    del kind


def flat(config: dict, prefix: str = "") -> dict:
    """Returns `{"a.b": value}` of nested dicts."""
    fields = {}
    for k, v in config.items():
        fields |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return fields
