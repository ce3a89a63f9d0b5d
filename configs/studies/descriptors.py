"""Which descriptors, and does their combination beat the single ones?

The twelve sets of the paper and R-MAC; the order matters, since the first descriptor feeds
the auxiliary module.
"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "SG"
SETS = ("S", "M", "G", "SM", "MS", "SG", "GS", "MG", "GM", "SMG", "MSG", "GSM", "R")
VARIANTS = {letters: {"model.descriptors": letters} for letters in SETS}
