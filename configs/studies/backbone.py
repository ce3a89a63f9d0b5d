"""What does a deeper network bring?

All of them start as the config says; with model.pretrained, whose weights fit one backbone
only, copy this file and give every variant its own.
"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "resnet18"
BACKBONES = ("resnet10", "resnet18", "resnet34", "resnet50", "se_resnet50", "resnext50_32x4d")
VARIANTS = {name: {"model.backbone": name} for name in BACKBONES}
