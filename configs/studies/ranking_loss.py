"""Which ranking loss, each with the margins of the config?"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "batch_hard_triplet"
LOSSES = (
    "batch_hard_triplet",
    "batch_all_triplet",
    "semi_hard_triplet",
    "soft_margin_triplet",
    "contrastive",
    "multi_similarity",
    "info_nce",
    "sup_con",
    "circle",
    "lifted_structure",
    "n_pair",
    "smooth_ap",
    "recall_at_k",
)
VARIANTS = {name: {"loss.ranking": name} for name in LOSSES}
