"""The work folder of a run: its config, its compiled programs."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from cgd_jax.config import ConfigError, differences, to_dict


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Refuses a work folder that holds a run of another config.

    Raises:
      ConfigError: names every difference.
    """
    path = Path(workdir, "config.json")
    if not path.exists():
        return
    changes = differences(json.loads(path.read_text(encoding="utf-8")), to_dict(config))
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ConfigError(
            f"{workdir} holds a run with another config. Choose another folder with "
            f"--workdir=, delete this one, or undo the changes:{listed}"
        )


def keep_compiled(workdir: str) -> None:
    """Keeps compiled programs beside the work folders, so that the next run starts sooner."""
    if jax.config.jax_compilation_cache_dir is None:  # else the user has chosen a place
        folder = Path(workdir).resolve().parent / ".compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
