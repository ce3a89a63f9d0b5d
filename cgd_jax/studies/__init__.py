"""Variants of an experiment, several seeds each, run and compared."""
