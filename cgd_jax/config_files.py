"""Where the files in configs/ lie: in a clone beside the package, once installed within it."""

import sys
import types
from pathlib import Path

__all__ = ["FOLDER", "find", "make_importable", "names"]

_HERE = Path(__file__).resolve().parent
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


def names() -> list[str]:
    """Returns what `find` knows by name: "cub200", "glyphs", ..."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem != "base")


def find(argument: str) -> str:
    """Returns the value of --config with its file looked up.

    Args:
      argument: the name or the path of a config, and what follows a colon: "glyphs",
        "glyphs:SMG", "configs/glyphs.py", "mine.py". A path that does not exist here but below
        `FOLDER` is taken from there.

    Returns:
      The path, and what followed the colon; the argument as it was if there is no such file.
    """
    given, colon, rest = argument.partition(":")
    if Path(given).is_file():
        return argument
    path = FOLDER / f"{given}.py" if given in names() else FOLDER.parent / given
    return f"{path}{colon}{rest}" if given and path.is_file() else argument


def make_importable() -> None:
    """Lets a config file say `from configs import base`, wherever it and the package lie."""
    if "configs" not in sys.modules:
        package = types.ModuleType("configs")
        package.__path__ = [str(FOLDER)]
        sys.modules["configs"] = package
