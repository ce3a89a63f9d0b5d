"""What do the temperature and the label smoothing of the auxiliary loss do, alone and together?"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "both"
VARIANTS = {
    "neither": {"loss.temperature": 1.0, "loss.smoothing": 0.0},
    "temperature": {"loss.temperature": 0.5, "loss.smoothing": 0.0},
    "smoothing": {"loss.temperature": 1.0, "loss.smoothing": 0.1},
    "both": {"loss.temperature": 0.5, "loss.smoothing": 0.1},
}
