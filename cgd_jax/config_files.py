"""Where the files of configs/ lie: in a clone beside the package, once installed within it."""

import importlib
import sys
import types
from pathlib import Path

from ml_collections import ConfigDict

_PACKAGE = Path(__file__).resolve().parent
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def listed(folder: Path = FOLDER) -> str:
    """Lists the configs that `find` knows by name: "base, cars196, ..."."""
    return ", ".join(sorted(path.stem for path in folder.glob("[!_]*.py")))


def find(config: str, folder: Path = FOLDER) -> Path | None:
    """Returns the file of a config or a study; None if there is no such file.

    It is a file of the user's, or one of `folder` by its name, such as "glyphs", or its path in a
    clone, such as "configs/glyphs.py".
    """
    for path in (Path(config), folder / f"{config}.py", FOLDER.parent / config):
        if path.suffix == ".py" and path.is_file():
            return path
    return None


def make_importable() -> None:
    """Lets a config say `from configs import base`, wherever it and this package lie.

    A folder configs/ where the command runs can be imported from as well.
    """
    if "configs" not in sys.modules:
        package = types.ModuleType("configs")
        package.__path__ = [str(FOLDER), str(Path("configs").resolve())]
        sys.modules["configs"] = package


def base_config() -> ConfigDict:
    """Returns configs/base.py's: every key with its default."""
    make_importable()
    return importlib.import_module("configs.base").get_config()
