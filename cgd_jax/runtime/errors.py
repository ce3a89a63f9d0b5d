"""Errors that are for the person who gave a command, not for the programmer."""


class UserError(Exception):
    """What the user can mend; the message says what is wrong, where, and what to do."""


class InputError(UserError, ValueError):
    """A value, a file or an option that cannot be used."""


class ConfigError(InputError):
    """A config that cannot be run."""
