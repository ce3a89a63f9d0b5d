"""The tiny networks that are compared with those of other libraries, and their images' sides."""

VIT = {"width": 16, "depth": 2, "heads": 2}

CONVNEXT = {"depths": (1, 2, 1, 1), "widths": (4, 8, 8, 12), "last_stride": 2}

OPTIONS = {
    "convnext_tiny": CONVNEXT,
    "convnextv2_tiny": CONVNEXT,
    "dinov2_small": {**VIT, "grid": 5},
    "dinov2_small_reg": {**VIT, "grid": 5},
}
SIZES = {"convnext_tiny": 64, "convnextv2_tiny": 64, "dinov2_small": 42, "dinov2_small_reg": 42}
