"""Does the auxiliary loss help on pictures of eight pixels?"""

CONFIG = "tests/tiny.py"
SEEDS = (0, 1)
REFERENCE = "both"
VARIANTS = {"rank": {"loss.classification_weight": 0.0}, "both": {}}
