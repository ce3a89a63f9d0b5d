"""Trains and evaluates: `python main.py --config=configs/glyphs.py`."""

from cgd_jax import cli

if __name__ == "__main__":
    cli.run()
