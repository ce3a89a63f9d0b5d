"""What does a deeper network bring, and what another kind of network?

Patches are small, so that 32 × 32 pixels have 4 × 4 positions in a ConvNeXt and 8 × 8 in a vision
transformer. All of them start as the config says; with model.pretrained, whose weights fit one
backbone only, copy this file and give every variant its own.
"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "resnet18"
BACKBONES = ("resnet10", "resnet18", "resnet34", "resnet50", "se_resnet50", "resnext50_32x4d")
# The options of ResNets that configs/glyphs.py sets, as they are where there are none.
PUBLISHED = {"model.width": 64, "model.stem": "7x7"}
VARIANTS = {name: {"model.backbone": name} for name in BACKBONES}
VARIANTS |= {
    "shufflenet": PUBLISHED | {"model.backbone": "shufflenet_v2_x0_5"},
    "convnextv2": PUBLISHED | {"model.backbone": "convnextv2_atto", "model.patch_size": 2},
    "vit": PUBLISHED | {"model.backbone": "dinov3_tiny", "model.patch_size": 4},
    "vit_class_token": PUBLISHED
    | {"model.backbone": "dinov3_tiny", "model.patch_size": 4, "model.descriptors": "CSG"},
}
