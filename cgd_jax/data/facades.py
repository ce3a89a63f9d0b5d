"""facades: in which street, and where in it, was this photograph taken?

Streets of drawn houses in a plane, nothing to download. Photographs are taken from the middle of a
street, of its north or its south side; each has light, noise, a crop and things in the way of its
own. What stands within 25 m of each other overlaps, as on a real street.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cgd_jax.data import truth
from cgd_jax.data.builder import DrawnBuilder

SIZE = 48  # pixels of a photograph
VIEW = 20.0  # metres of the street that it shows
LENGTH = 600  # metres of a street
FLOOR = 3.0  # metres
BETWEEN = 60  # metres between streets: no photograph is near one of the next street
SEED = 0
TRAIN, TEST = range(0, 24), range(24, 32)  # streets
PLACES_EVERY, VIEWS = 40, 6  # training: metres between places, photographs of each
DATABASE_EVERY, QUERIES = 10, 32  # test: metres between photographs, queries a side of a street


class House(NamedTuple):
    """One house of a street; lengths are metres, colors RGB."""

    left: float
    width: float
    height: float
    roof: float  # height of a gable
    wall: np.ndarray
    glass: np.ndarray
    frame: np.ndarray
    windows: np.ndarray  # floors, columns
    window: np.ndarray  # the shares of a floor and a column that one fills
    door: int  # the column that has it


class Facades(DrawnBuilder):
    """TFDS builder of the drawn streets: some train, in others queries search a database."""

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "query", "gallery")}

    def _generate_examples(self, split):
        for key, (street, side, along, label) in enumerate(positions(split)):
            rng = np.random.default_rng([SEED, 1, ("train", "query", "gallery").index(split), key])
            east, north = along + rng.normal(0, 0.5), BETWEEN * street + rng.normal(0, 0.5)
            buffer = io.BytesIO()
            photograph(houses(street, side), east, rng).save(buffer, "PNG")
            where = f"@{east:010.2f}@{north:010.2f}@@@@@{key:05d}@@{180 * side:03d}"
            example = {"image": buffer.getvalue(), "label": label}
            example["class_name"] = f"street {street} {'NS'[side]}, {along // 100 * 100:.0f} m"
            yield key, example | {"id": f"{where}@@@@@@.png"}  # named as files of places are

    def truth(self, query, gallery, **near) -> truth.Truth:
        """Returns what is right, for images with these names; `near` is of `truth.of_positions`."""
        fields = {name: name.split("@") for name in (*query, *gallery)}
        stored = {name: [float(f[9]), float(f[1]), float(f[2])] for name, f in fields.items()}
        return truth.of_positions(stored, query, gallery, **near)


def positions(split: str) -> list[tuple[int, int, float, int]]:
    """Returns where the photographs of a split are taken: street, side, metres along, label."""
    found = []
    for street in TRAIN if split == "train" else TEST:
        for side in (0, 1):
            rng = np.random.default_rng([SEED, 2, street, side])
            row = 2 * street + side
            if split == "train":  # a place is a class
                for place, along in enumerate(range(30, LENGTH - 20, PLACES_EVERY)):
                    label = 100 * row + place
                    views = along + rng.uniform(-3, 3, VIEWS)
                    found += [(street, side, x, label) for x in views]
                continue
            taken = np.arange(20.0, LENGTH - 20, DATABASE_EVERY)
            if split == "query":
                taken = rng.uniform(20, LENGTH - 20, QUERIES)
            found += [(street, side, x, 100 * row + int(x // 100)) for x in taken]
    return found


def houses(street: int, side: int) -> list[House]:
    """Draws the houses of one side of a street, each like no other."""
    rng, left, found = np.random.default_rng([SEED, 0, street, side]), -40.0, []
    while left < LENGTH + 40:
        width, windows = rng.uniform(6, 13), rng.integers((1, 2), (5, 6))
        height, roof = FLOOR * windows[0] + rng.uniform(0.5, 2), rng.choice([0, 1.5, 2.5, 3.5])
        wall, glass, frame = rng.uniform(((70,), (20,), (60,)), ((230,), (110,), (250,)), (3, 3))
        window, door = rng.uniform(0.3, 0.8, 2), rng.integers(windows[1])
        look = wall, glass, frame, windows, window, door
        found.append(House(left, width, height, roof, *look))
        left += width + rng.choice([0.0, rng.uniform(1, 4)])
    return found


def photograph(street: list[House], along: float, rng: np.random.Generator) -> Image.Image:
    """Takes a photograph of one side of a street from a place along it."""
    side = 2 * SIZE  # drawn at twice the size, and reduced
    view, shift, ground = VIEW * rng.uniform(0.85, 1.15), rng.normal(0, 1), rng.uniform(0.78, 0.9)
    left, scale = along + shift - view / 2, side / view
    sky = np.array([150, 190, 230]) * rng.uniform(0.5, 1.1) + rng.normal(0, 12, 3)
    image = Image.new("RGB", (side, side), _color(sky))
    draw = ImageDraw.Draw(image)

    def fill(color, *corners):  # metres along the street and above the ground
        points = [((x - left) * scale, ground * side - y * scale) for x, y in corners]
        draw.polygon(points, _color(color))

    def box(color, x, y, width, height):
        fill(color, (x, y), (x + width, y), (x + width, y + height), (x, y + height))

    for house in street:
        if left - house.width < house.left < left + view:
            _draw_house(house, fill, box)
    box(rng.uniform(70, 110, 3), left, -view, view, view)
    for _ in range(rng.integers(0, 3)):  # cars
        box(rng.uniform(20, 230, 3), left + rng.uniform(-2, view), -0.4, rng.uniform(2, 4), 1.4)
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64)
    # Light: its strength, its color and the shadow that lies across.
    pixels = 255 * (pixels / 255) ** rng.uniform(0.7, 1.5) * rng.uniform(0.65, 1.15)
    pixels *= rng.uniform(0.85, 1.15, 3)
    edge = rng.uniform(-0.5, 1.5) * SIZE + rng.normal(0, 0.5) * np.arange(SIZE)[:, None]
    pixels *= np.where(np.arange(SIZE) < edge, rng.uniform(0.55, 1), 1)[..., None]
    pixels += rng.normal(0, rng.uniform(2, 14), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_house(house, fill, box):
    right, top = house.left + house.width, house.height
    box(house.wall, house.left, 0, house.width, top)
    peak = house.left + house.width / 2, top + house.roof
    fill(house.wall * 0.6, (house.left, top), peak, (right, top))
    cell = np.array([FLOOR, house.width / house.windows[1]])
    height, width = house.window * cell
    for floor, column in np.ndindex(*house.windows):
        y, x = (floor, column) * cell + (0, house.left)
        if floor == 0 and column == house.door:
            box(house.frame, x + 0.2 * cell[1], 0, 0.6 * cell[1], 2.2)
            continue
        y, x = y + (cell[0] - height) / 2, x + (cell[1] - width) / 2
        box(house.frame, x - 0.15, y - 0.15, width + 0.3, height + 0.3)
        box(house.glass, x, y, width, height)


def _color(rgb):
    return tuple(np.clip(rgb, 0, 255).astype(int).tolist())
