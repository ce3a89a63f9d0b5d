"""What a person sees of a run: tables, curves, pictures."""
