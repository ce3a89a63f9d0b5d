"""Evaluation of a run: its test images embedded, ranked, measured, and compared with others."""
