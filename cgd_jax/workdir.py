"""The work folder of a run: its name, its config, the programs compiled beside it."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from cgd_jax.config import ConfigError, differences, from_dict, to_dict

__all__ = ["check_workdir", "default_workdir", "keep_compiled", "read_config"]


def default_workdir(config_argument: str, parent: str = "runs") -> str:
    """Returns the folder of a run that names none: configs/glyphs.py:SMG → runs/glyphs-SMG."""
    path, _, argument = config_argument.partition(":")
    return str(Path(parent, "-".join(filter(None, [Path(path).stem, argument]))))


def read_config(workdir: str | Path) -> ConfigDict:
    """Reads the config of a run; keys that are newer than the run are filled in.

    Raises:
      FileNotFoundError: There is no run.
      ConfigError: Its config.json is damaged.
    """
    path = Path(workdir, "config.json")
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no run in {workdir}: it has no config.json. Give the folder of a run with "
            f"--workdir=, or train one first."
        ) from None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}.") from error


def check_workdir(config: ConfigDict, workdir: str | Path) -> None:
    """Refuses a work folder that holds a run of another config.

    Raises:
      ConfigError: Names every difference.
    """
    if not Path(workdir, "config.json").exists():
        return
    changes = differences(to_dict(read_config(workdir)), to_dict(config))
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ConfigError(
            f"{workdir} holds a run with another config. Choose another folder with "
            f"--workdir=, delete this one, or undo the changes:{listed}"
        )


def keep_compiled(workdir: str | Path) -> None:
    """Keeps compiled programs beside the work folders, so that the next run starts sooner."""
    # jax.config gets its attributes at run time.
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is None:  # else the user has chosen a place
        folder = Path(workdir).resolve().parent / ".compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
