"""ShapeEdit's scenes: textured shapes on varied backgrounds, as plain values that `render` draws.

Knows what a scene is and how one is drawn at random; knows nothing of edits or pixels. Positions and radii
are in pixels of a 256-pixel square; objects sit in distinct cells of a 3 x 3 grid, so that they never overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

SIDE = 256
CELL = SIDE / 3

SHAPES = ("circle", "square", "triangle", "diamond", "hexagon", "star", "cross", "ring")
COLOURS = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.97, 0.55, 0.09),
    "yellow": (0.98, 0.88, 0.16),
    "green": (0.13, 0.62, 0.22),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.13, 0.28, 0.85),
    "purple": (0.52, 0.18, 0.72),
    "pink": (0.97, 0.50, 0.72),
    "brown": (0.48, 0.28, 0.12),
    "white": (0.96, 0.96, 0.96),
    "grey": (0.52, 0.52, 0.52),
    "black": (0.06, 0.06, 0.06),
}
TEXTURES = ("plain", "striped", "checkered", "dotted")
BACKGROUNDS = ("plain", "gradient", "striped", "checkered", "cloudy", "picture")
"""`cloudy` and `picture` occur in sources only: no instruction could say exactly what they look like."""
STYLES = ("none", "greyscale", "sepia", "inverted", "night", "blurred", "bright", "duotone")
"""`duotone` is in no training split of the demo model: it is the style a LoRA teaches it."""
PLACES = (
    *("top left", "top centre", "top right", "centre left", "centre"),
    *("centre right", "bottom left", "bottom centre", "bottom right"),
)
SIZES = {"small": 20.0, "medium": 28.0, "large": 37.0}

HELD_OUT_PAIRS = 12
"""One in this many (shape, colour) pairs occurs in no training scene."""


@dataclass(frozen=True)
class Object:
    """One shape. cell: index into PLACES. offset: of its centre from the cell's, pixels. tilt: radians."""

    shape: str
    colour: str
    texture: str
    cell: int
    radius: float = SIZES["medium"]
    offset: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        column, row = self.cell % 3, self.cell // 3
        return (column + 0.5) * CELL + self.offset[0], (row + 0.5) * CELL + self.offset[1]


@dataclass(frozen=True)
class Background:
    """pattern: of BACKGROUNDS. seed: of what `cloudy` and `picture` look like."""

    pattern: str
    colour: str
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    background: Background
    objects: tuple[Object, ...] = ()
    style: str = "none"


def held_out_pair(shape: str, colour: str) -> bool:
    """Whether a (shape, colour) pair is kept for the test split."""
    return (SHAPES.index(shape) * 5 + list(COLOURS).index(colour)) % HELD_OUT_PAIRS == 0


def draw_scene(rng: Random, held_out: bool, picture: bool = False) -> Scene:
    """A random scene of 1 to 4 objects, all different in shape and colour taken together.

    held_out: whether pairs of the test split may occur. picture: a cluttered picture without objects instead.
    """
    if picture:
        return Scene(Background("picture", "grey", rng.getrandbits(48)))
    colour = rng.choice(list(COLOURS))
    background = Background(rng.choice(BACKGROUNDS[:5]), colour, rng.getrandbits(48))
    objects: list[Object] = []
    for cell in rng.sample(range(9), rng.choice((1, 2, 2, 3, 3, 4))):
        taken = {(o.shape, o.colour) for o in objects}
        while True:
            pair = rng.choice(SHAPES), rng.choice([c for c in COLOURS if c != colour])
            if pair not in taken and (held_out or not held_out_pair(*pair)):
                break
        objects.append(
            Object(
                *pair,
                texture=rng.choice(TEXTURES) if rng.random() < 0.6 else "plain",
                cell=cell,
                radius=rng.choice(list(SIZES.values())) * rng.uniform(0.93, 1.03),
                offset=(rng.uniform(-4, 4), rng.uniform(-4, 4)),
                tilt=rng.uniform(-0.3, 0.3),
            )
        )
    return Scene(background, tuple(objects))
