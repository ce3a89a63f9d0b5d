"""Packages that only some parts of the project need."""

import importlib.util


def require(what: str, extra: str, *modules: str) -> None:
    """Raises ModuleNotFoundError with the first of some modules that is missing, and its extra."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing(what, extra, module)


def missing(what: str, extra: str, module: str | None) -> ModuleNotFoundError:
    """Returns the error that `require` raises."""
    return ModuleNotFoundError(
        f"{what} needs the package {module}, which is not installed. Install all that it needs "
        f"with pip install 'cgd_jax[{extra}]', or in a clone pip install '.[{extra}]'.",
        name=module,
    )
