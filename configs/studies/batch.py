"""How large a batch, and how many images of a class in it? Classes × images."""

CONFIG = "configs/glyphs.py"
SEEDS = (0, 1, 2)
REFERENCE = "32 × 4"
SHAPES = ((16, 4), (32, 4), (64, 4), (64, 2), (16, 8), (8, 16))
VARIANTS = {
    f"{classes} × {images}": {
        "train.classes_per_batch": classes,
        "train.images_per_class": images,
    }
    for classes, images in SHAPES
}
