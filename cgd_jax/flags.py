"""What a command line is made of: commands, and the flags that they take."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import flags

__all__ = ["Command", "Flag", "define"]


class Command(NamedTuple):
    """What can be done: a word behind the program's name, or the value of --mode."""

    what: str  # it does
    usage: str  # an example, behind its name
    takes: tuple[str, ...]  # flags of its own
    arguments: tuple[str, ...] = ()  # flags that words without dashes fill, in their order
    extra: str = "train"  # of pyproject.toml, with the packages it needs


class Flag(NamedTuple):
    """A flag of a command."""

    kind: Callable[..., Any]  # how absl defines it
    what: str  # it is
    value: str = "NUMBER"  # what --help calls its value
    default: Any = None
    options: tuple = ()  # further arguments of `kind`: names to choose from, bounds


def define(known: Mapping[str, Flag], names: tuple[str, ...]) -> flags.FlagValues:
    """Returns flags that are not parsed yet."""
    given = flags.FlagValues()
    for name in names:
        kind, what, _, default, options = known[name]
        if kind is flags.DEFINE_enum:
            kind(name, default, list(options), what, flag_values=given)
        else:
            kind(name, default, what, *options, flag_values=given)
    return given
