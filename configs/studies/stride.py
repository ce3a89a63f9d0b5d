"""Is the last stage better left at full resolution (the paper) than downsampled (ResNet)?"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "stride 1"
VARIANTS = {"stride 1": {"model.last_stride": 1}, "stride 2": {"model.last_stride": 2}}
