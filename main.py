"""The command line of a clone: `python main.py --config=glyphs`; see cgd_jax/__main__.py."""

from cgd_jax.__main__ import main

if __name__ == "__main__":
    main()
