"""What was found, for people and for programs: a table, a picture, JSON."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tabulate import tabulate

from cgd_jax.data.dataset import printable
from cgd_jax.reports import lettering
from cgd_jax.runtime import files
from cgd_jax.search.duplicates import Group
from cgd_jax.search.index import Index
from cgd_jax.search.stores import Hit

__all__ = ["Answer", "draw", "groups_as_json", "groups_table", "hits_as_json", "hits_table"]
