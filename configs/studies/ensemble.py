"""Do combined descriptors retrieve like an ensemble of networks, at the price of one?

Networks with one descriptor each, trained apart with the budget of the combination, are compared
with it: one by one, side by side, and by PCA in the dimension of one. The members of a seed share
batches and first weights, as the branches of one network do. The combination is also trained for
as many steps as the members together.
"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2, 3, 4)
REFERENCE = "SG"
VARIANTS = {letters: {"model.descriptors": letters} for letters in ("S", "M", "G", "SG", "SMG")}
VARIANTS |= {
    "SG twice as long": VARIANTS["SG"] | {"train.steps": lambda steps: 2 * steps},
    "SMG thrice as long": VARIANTS["SMG"] | {"train.steps": lambda steps: 3 * steps},
}
TOGETHER = {"S + G": ("S", "G"), "S + M + G": ("S", "M", "G")}
