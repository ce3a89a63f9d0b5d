"""The tiny networks that are compared with those of other libraries."""

VIT = {"width": 16, "depth": 2, "heads": 2}
CONVNEXT = {"depths": (1, 2, 1, 1), "widths": (4, 8, 8, 12), "last_stride": 2}

# What differs from the published network.
OPTIONS = {
    "convnext_tiny": CONVNEXT,
    "convnextv2_tiny": CONVNEXT,
    "dinov2_small": {**VIT, "grid": 5},
    "dinov2_small_reg": {**VIT, "grid": 5},
    "dinov3_small": VIT,
    "shufflenet_v2_x1_0": {
        "stage_sizes": (2, 1, 1),
        "widths": (4, 8, 12, 16, 20),
        "last_stride": 2,
    },
    "efficientnet_lite0_timm": {"width": 0.2, "depth": 0.2, "last_stride": 2},
    "bninception": {"divisor": 16, "last_stride": 2},
    "clip_base_patch32_224": {**VIT, "grid": 5, "published_patch": 16},
    "siglip_base_patch16_224": {**VIT, "grid": 5},
    "vit_base_patch16_224": {**VIT, "grid": 5},
    "swin_tiny": {
        "depths": (2, 2, 1, 1),
        "heads": (1, 2, 2, 4),
        "width": 8,
        "window": 3,
        "last_stride": 2,
    },
}
# Of the images, in pixels: all positions are interpolated.
SIZES = {
    "efficientnet_lite0_timm": 45,
    "convnext_tiny": 64,
    "convnextv2_tiny": 64,
    "dinov2_small": 42,
    "dinov2_small_reg": 42,
    "dinov3_small": 48,
    "shufflenet_v2_x1_0": 64,
    "bninception": 64,
    "clip_base_patch32_224": 48,
    "siglip_base_patch16_224": 48,
    "vit_base_patch16_224": 48,
    "swin_tiny": 86,  # maps of 22, 11, 6 and 3, the first two shifted and padded to windows
}
