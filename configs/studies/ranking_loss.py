"""Which ranking loss, each with the margins and scales of its paper?

The last three are classifications of the embedding by angles, in the place of a ranking loss.
"""

from cgd_jax.losses import CENTER_LOSSES, PROXY_LOSSES, RANKING_LOSSES

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "batch_hard_triplet"
VARIANTS = {name: {"loss.ranking": name} for name in (*RANKING_LOSSES, *PROXY_LOSSES)}
# The paper's for fine-grained retrieval; the config has those for faces.
VARIANTS["circle"] |= {"loss.circle.margin": 0.4, "loss.circle.scale": 80.0}
VARIANTS |= {
    name: {
        "loss.classification": name,
        "loss.ranking_weight": 0.0,
        "loss.classification_weight": 1.0,
    }
    for name in CENTER_LOSSES
}
