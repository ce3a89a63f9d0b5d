"""Shapes for images that keep their aspect: a few, so that few programs are compiled.

An image is resized to the shape whose aspect is nearest to its own: nothing is padded, nothing is
cut off, and what the network sees depends on the image alone. Photographs of 4:3, 3:2 and 16:9
change by a few percent in width; what is longer than 3:1 is pressed into 3:1.
"""

import math
from functools import lru_cache

ASPECTS = ("square", "keep")  # what may become of the aspect of images
Shape = tuple[int, int]  # height, width in pixels
Size = int | tuple[Shape, ...]  # the side of a square, or shapes of which an image takes one

# Longer by shorter side, of what cameras and screens have, and of panoramas.
RATIOS = (1, 4 / 3, 3 / 2, 16 / 9, 9 / 4, 3)


@lru_cache
def shapes_around(side: int, patch: int = 1) -> tuple[Shape, ...]:
    """Returns shapes of about side² pixels, one for each of `RATIOS`, upright and lying.

    Their sides are multiples of about 32 pixels, of a quarter of a small `side`, and of `patch`.
    """
    step = patch * max(round(min(32, side / 4) / patch), 1)
    sides = range(step, 4 * side + step, step)

    def off(shape: Shape, ratio: float) -> float:
        height, width = shape
        return abs(math.log(width / height / ratio)) + abs(math.log(height * width / side**2))

    lying = [min(((h, w) for h in sides for w in sides), key=lambda s: off(s, r)) for r in RATIOS]
    return tuple(sorted({*lying, *(shape[::-1] for shape in lying)}))


def as_shape(size: int | Shape) -> Shape:
    """Returns the shape of a square of this side; a shape as it is."""
    return (size, size) if isinstance(size, int) else size


def nearest(shapes: tuple[Shape, ...], height: int, width: int) -> Shape:
    """Returns the shape whose aspect is nearest to that of an image."""
    return min(shapes, key=lambda shape: abs(math.log(shape[1] * height / shape[0] / width)))
