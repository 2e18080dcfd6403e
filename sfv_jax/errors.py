"""Base class of all errors that a user can cause and correct."""


class UserError(ValueError):
    """Wrong input, settings or files; the message gives the cause and the remedy.

    Commands print only the message. Any other exception is a bug and keeps its traceback.
    """


class InterruptedWork(UserError):
    """Work that was stopped on request before its end; commands exit with the code of Ctrl-C, 130."""
