"""Is joining normalized branches under one ranking loss better than the other ways to combine?

Separate is the paper's rival A, a ranking loss for every branch; raw its rival B, descriptors
joined without a projection and normalization of their own.
"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "concat"
VARIANTS = {name: {"model.combination": name} for name in ("concat", "sum", "separate", "raw")}
