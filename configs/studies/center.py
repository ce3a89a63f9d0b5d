"""Does taking the mean from the descriptors keep the embedding apart, and does that teach more?"""

from cgd_jax.models.cgd import CENTERS

CONFIG = "configs/cars196_lite0.py"
SEEDS = (0, 1, 2)
REFERENCE = "none"
VARIANTS = {center: {"model.center": center} for center in CENTERS}
