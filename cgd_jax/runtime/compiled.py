"""Compiled programs, kept for the next start."""

import os
import sys

import platformdirs

MOST = 2**31  # bytes; what was used longest ago goes first


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, which all runs and commands share.

    JAX's own settings have the last word: `JAX_COMPILATION_CACHE_DIR=FOLDER` chooses another
    folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
    """
    settings = {
        "jax_compilation_cache_dir": platformdirs.user_cache_dir("cgd_jax"),
        "jax_compilation_cache_max_size": MOST,
    }
    jax = sys.modules.get("jax")
    if jax is None:  # which reads the environment when it is imported
        for name, value in settings.items():
            os.environ.setdefault(name.upper(), str(value))
    elif jax.config.jax_compilation_cache_dir is None:
        for name, value in settings.items():
            jax.config.update(name, value)
