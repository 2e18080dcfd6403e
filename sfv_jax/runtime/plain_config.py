"""As much of ml_collections.ConfigDict as the defaults need, for accelerator images that have only jax and its kin.

Only the benchmark runs there. Fields are attributes and items; `update` goes into nested fields.
"""


class ConfigDict(dict):
    """A dict of fields. Raises AttributeError for a field that does not exist."""

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
        for name, value in (dict(changes) | more).items():
            if isinstance(value, dict) and isinstance(self.get(name), ConfigDict):
                self[name].update(value)
            else:
                self[name] = value

    def to_dict(self) -> dict:
        return {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in self.items()}

    def copy_and_resolve_references(self) -> "ConfigDict":
        return ConfigDict(self.to_dict())
