"""How many dimensions does the embedding need?"""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "512"
VARIANTS = {str(size): {"model.embedding_dim": size} for size in (64, 128, 256, 512, 1024, 1536)}
