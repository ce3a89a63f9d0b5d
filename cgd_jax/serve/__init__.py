"""A page and a JSON API over an index: --mode=serve."""
