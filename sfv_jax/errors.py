"""The base class of every error that a user can cause and put right."""


class UserError(ValueError):
    """Wrong input, settings or files; the message says what is wrong and what to do.

    Commands print the message alone. Everything else is a bug and keeps its traceback.
    """
