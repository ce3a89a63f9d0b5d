"""How good is a setting, if nothing is chosen on test classes and no one draw of classes decides?

Four networks, each without another quarter of the training classes, which choose its step; tested
one by one and averaged, and with their embeddings side by side, as in "A Metric Learning Reality
Check" (Musgrave et al., https://arxiv.org/abs/2003.08505).
"""

CONFIG = "configs/reality_check.py"
SEEDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
REFERENCE = "folds, separated"
VARIANTS = {f"fold {i}": {"data.fold": f"{i}/4"} for i in range(1, 5)}
TOGETHER = {"folds": tuple(VARIANTS)}
