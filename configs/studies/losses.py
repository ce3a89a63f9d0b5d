"""Does the auxiliary classification loss help the ranking loss, and what is each worth alone?"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "both"
VARIANTS = {
    "ranking only": {"loss.classification_weight": 0.0},
    "classification only": {"loss.ranking_weight": 0.0},
    "both": {},
}
