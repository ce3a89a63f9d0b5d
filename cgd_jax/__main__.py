"""`python -m cgd_jax`, and the command `cgd_jax` that pip installs."""

import sys

from cgd_jax.runtime import packages


def main() -> None:
    """Does what the command line says, if the packages that read it are there."""
    try:
        packages.require("The command line", "train", "absl", "ml_collections", "tqdm")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error} To search your own pictures, cgd_jax[search] is enough.")
    from cgd_jax import cli

    cli.main(sys.argv)


if __name__ == "__main__":
    main()
