"""Of the many values of a parameter, some are tried at once and all by `pytest -m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Marks all but the first values as slow; a tuple holds those of several parameters."""
    values = list(values)
    later = [value if isinstance(value, tuple) else (value,) for value in values[count:]]
    return values[:count] + [pytest.param(*value, marks=pytest.mark.slow) for value in later]
