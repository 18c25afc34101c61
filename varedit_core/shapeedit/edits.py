"""ShapeEdit's edits: families of instructions, in many wordings, and what each does to a scene.

The families follow PIE-Bench (arXiv 2310.01506) and EMU-Edit (arXiv 2311.10089). Every instruction has one exact
result: what is added stands upright at its cell's centre in medium size, sizes become exactly small or large.

The test split holds what training never sees: instructions word for word, and (shape, colour) pairs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from ..wording import with_article
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    Object,
    Scene,
    draw_scene,
    held_out_pair,
)

HELD_OUT_TEXTS = 6
"""One in this many instructions is kept for the test split."""
PATTERNS = BACKGROUNDS[:4]
"""Of backgrounds that an instruction can ask for."""
OTHERS = 3
"""Distractors that other instructions of the family would give, beside the near misses."""


@dataclass(frozen=True)
class Edit:
    """What an instruction asks for. thing, colour: shape and colour of the object that is edited, as it becomes; for a
    style, its phrase."""

    target: Scene
    words: dict[str, str]
    thing: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Sample:
    """One task. distractors: near misses of the target, and results of other instructions of the family on the same
    source."""

    family: str
    instruction: str
    source: Scene
    target: Scene
    distractors: tuple[Scene, ...] = ()

    @property
    def new_pair(self) -> bool:
        """Whether its scenes hold a (shape, colour) pair that no training scene has."""
        return any(held_out_pair(o.shape, o.colour) for o in (*self.source.objects, *self.target.objects))


def draw_sample(rng: Random, split: str, family: str | None = None, picture: bool = False, style: str = "") -> Sample:
    """A random sample of `split` ("train" or "test").

    family: one of FAMILIES, random otherwise. picture: the source is a cluttered picture (of PICTURE_FAMILIES).
    style: restricts the style family to one style. The test split draws distractors too.
    """
    if split not in ("train", "test"):
        raise ValueError(f"the split must be train or test, got {split!r}")
    known = PICTURE_FAMILIES if picture else tuple(FAMILIES)
    family = family or rng.choice(known)
    if family not in known:
        raise ValueError(f"the family must be one of {', '.join(known)}, got {family!r}")
    propose, wordings = FAMILIES[family]
    if style:
        propose = _only(style)
    test = split == "test"
    while True:
        scene = draw_scene(rng, test, picture)
        wording = rng.randrange(len(wordings))
        edit = propose(rng, scene)
        if edit and is_held_out(family, wording, edit) == test:
            break
    distractors = _distractors(rng, scene, edit.target, family) if test else ()
    return Sample(family, _instruction(family, wording, edit), scene, edit.target, distractors)


def _instruction(family: str, wording: int, edit: Edit) -> str:
    return FAMILIES[family][1][wording].format(**edit.words)


def _distractors(rng: Random, scene: Scene, target: Scene, family: str) -> tuple[Scene, ...]:
    """What the result must not be taken for: near misses, and up to three other results of the family."""
    misses = dict.fromkeys(miss for miss in near_misses(scene, target, family) if miss not in (target, scene))
    proposed = [FAMILIES[family][0](rng, scene) for _ in range(8 * OTHERS)]
    others = dict.fromkeys(edit.target for edit in proposed if edit and edit.target not in (target, scene, *misses))
    return (*misses, *list(others)[:OTHERS])


def near_misses(scene: Scene, target: Scene, family: str) -> list[Scene]:
    """The target with each other value of one thing that the family's instructions decide: the edited object's shape,
    colour, texture, size or place, the background's colour or pattern, the style. And with the edited object gone, or
    (for `move`) still at its old place too; for `remove`, with another object gone instead."""
    if family == "style":
        return [replace(target, style=style) for style in STYLES[1:]]
    if family == "background":
        what = "colour" if scene.background.colour != target.background.colour else "pattern"
        values = COLOURS if what == "colour" else PATTERNS
        return [replace(target, background=replace(target.background, **{what: value})) for value in values]
    if family == "remove":
        return [_without(scene, one) for one in scene.objects]
    new = next((one for one in target.objects if one not in scene.objects), None)
    if new is None:
        return []
    free = set(range(9)) - {one.cell for one in scene.objects} | {new.cell}
    values = {
        "shape": SHAPES if family in ("add", "replace") else (),
        "colour": COLOURS if family in ("add", "replace", "recolour") else (),
        "texture": TEXTURES if family == "texture" else (),
        "radius": tuple(SIZES.values()) if family == "resize" else (),
        "cell": sorted(free) if family in ("add", "move") else (),
    }
    others = [
        _with(target, new, replace(new, **{name: value})) for name, choices in values.items() for value in choices
    ]
    if family == "move":
        others.append(replace(target, objects=(*scene.objects, new)))
    return [*others, _without(target, new)]


def is_held_out(family: str, wording: int, edit: Edit) -> bool:
    """Whether an edit in that wording belongs to the test split."""
    if family == "style":  # every phrase of every style loses one wording
        phrases = next(p for p in _STYLE_PHRASES.values() if edit.thing in p)
        return (wording + phrases.index(edit.thing)) % HELD_OUT_TEXTS == 0
    if family == "keep":  # nothing to combine: the pairs in its scenes are what training has not seen
        return any(held_out_pair(o.shape, o.colour) for o in edit.target.objects)
    if edit.thing in SHAPES and held_out_pair(edit.thing, edit.colour):
        return True
    # A checksum, not hash(): the split must be the same in every process.
    return zlib.crc32(_instruction(family, wording, edit).encode()) % HELD_OUT_TEXTS == 0


def _add(rng: Random, scene: Scene) -> Edit | None:
    free = sorted(set(range(9)) - {o.cell for o in scene.objects})
    if len(scene.objects) > 3:
        return None
    new = _new_object(rng, scene, rng.choice(free))
    words = {"a": _article(new), "place": _place(new.cell)}
    return Edit(replace(scene, objects=(*scene.objects, new)), words, new.shape, new.colour)


def _remove(rng: Random, scene: Scene) -> Edit | None:
    old = rng.choice(scene.objects)
    return Edit(_without(scene, old), {"it": _refer(rng, scene, old)}, old.shape, old.colour)


def _replace(rng: Random, scene: Scene) -> Edit | None:
    old = rng.choice(scene.objects)
    if rng.random() < 0.5:
        shape = rng.choice([s for s in SHAPES if s != old.shape])
        new, phrase = replace(old, shape=shape, tilt=0.0), f"a {shape}"
    else:
        new = _new_object(rng, scene, old.cell)
        if new.shape == old.shape:
            return None
        new = replace(new, radius=old.radius, offset=old.offset)
        phrase = _article(new)
    if _has(scene, new):
        return None
    return Edit(_with(scene, old, new), {"it": _refer(rng, scene, old), "a": phrase}, new.shape, new.colour)


def _recolour(rng: Random, scene: Scene) -> Edit | None:
    old = rng.choice(scene.objects)
    new = replace(old, colour=rng.choice(list(COLOURS)))
    if new.colour in (old.colour, scene.background.colour) or _has(scene, new):
        return None
    return Edit(_with(scene, old, new), {"it": _refer(rng, scene, old), "colour": new.colour}, new.shape, new.colour)


def _texture(rng: Random, scene: Scene) -> Edit | None:
    old = rng.choice(scene.objects)
    new = replace(old, texture=rng.choice([t for t in TEXTURES if t != old.texture]))
    words = {"it": _refer(rng, scene, old, texture=False), "texture": new.texture}
    return Edit(_with(scene, old, new), words, old.shape, old.colour)


def _background(rng: Random, scene: Scene) -> Edit | None:
    old = scene.background
    if old.pattern == "cloudy" or rng.random() < 0.6:
        new, what = replace(old, colour=rng.choice(list(COLOURS))), "colour"
    else:
        new, what = replace(old, pattern=rng.choice(PATTERNS)), "pattern"
    if new == old or any(o.colour == new.colour for o in scene.objects):
        return None
    named = new.colour if what == "colour" else {"gradient": "shaded"}.get(new.pattern, new.pattern)
    return Edit(replace(scene, background=new), {"what": named})


def _move(rng: Random, scene: Scene) -> Edit | None:
    old = rng.choice(scene.objects)
    taken = {o.cell for o in scene.objects}
    if rng.random() < 0.6:
        cell = rng.choice([c for c in range(9) if c not in taken])
        where = f"to {_place(cell)}"
    else:
        way = rng.choice(("left", "right", "up", "down"))
        column, row = old.cell % 3, old.cell // 3
        column += {"left": -1, "right": 1}.get(way, 0)
        row += {"up": -1, "down": 1}.get(way, 0)
        cell = row * 3 + column
        if not (0 <= column < 3 and 0 <= row < 3) or cell in taken:
            return None
        where = f"one step {way}"
    new = replace(old, cell=cell, offset=(0.0, 0.0))
    return Edit(_with(scene, old, new), {"it": _refer(rng, scene, old), "where": where}, old.shape, old.colour)


def _resize(rng: Random, scene: Scene) -> Edit | None:
    old = rng.choice(scene.objects)
    size, bigger = rng.choice((("small", False), ("large", True)))
    radius = SIZES[size]
    if (radius / old.radius if bigger else old.radius / radius) < 1.2:
        return None
    word = rng.choice(("bigger", "larger", "large") if bigger else ("smaller", "tiny", "small"))
    new = replace(old, radius=radius)
    return Edit(_with(scene, old, new), {"it": _refer(rng, scene, old), "size": word}, old.shape, old.colour)


def _style(rng: Random, scene: Scene) -> Edit | None:
    return _styled(rng, scene, rng.choice(STYLES[1:-1]))


def _only(style: str) -> Callable[[Random, Scene], Edit | None]:
    return lambda rng, scene: _styled(rng, scene, style)


def _styled(rng: Random, scene: Scene, style: str) -> Edit:
    phrase = rng.choice(_STYLE_PHRASES[style])
    return Edit(replace(scene, style=style), {"style": phrase}, phrase)


def _keep(rng: Random, scene: Scene) -> Edit | None:
    return Edit(scene, {})


_STYLE_PHRASES = {
    "greyscale": ("black and white", "greyscale", "colourless"),
    "sepia": ("sepia", "like an old photograph", "faded brown"),
    "inverted": ("inverted", "like a negative", "with inverted colours"),
    "night": ("dark like at night", "a night scene", "a moonlit night"),
    "blurred": ("blurred", "out of focus", "soft and blurry"),
    "bright": ("brighter", "overexposed", "much lighter"),
    "duotone": ("duotone", "a duotone print", "a two-tone poster"),
}

FAMILIES: dict[str, tuple[Callable[[Random, Scene], Edit | None], tuple[str, ...]]] = {
    "add": (
        _add,
        (
            "add {a} in {place}",
            "put {a} in {place}",
            "place {a} in {place}",
            "draw {a} in {place} of the picture",
            "insert {a} at {place}",
            "there should be {a} in {place}",
            "I want {a} in {place}",
            "in {place}, add {a}",
        ),
    ),
    "remove": (
        _remove,
        (
            "remove {it}",
            "delete {it}",
            "take away {it}",
            "erase {it} from the picture",
            "get rid of {it}",
            "make {it} disappear",
            "the picture without {it}",
        ),
    ),
    "replace": (
        _replace,
        (
            "replace {it} with {a}",
            "turn {it} into {a}",
            "change {it} into {a}",
            "swap {it} for {a}",
            "put {a} where {it} is",
            "{it} should become {a}",
            "instead of {it} show {a}",
        ),
    ),
    "recolour": (
        _recolour,
        (
            "make {it} {colour}",
            "paint {it} {colour}",
            "colour {it} {colour}",
            "change the colour of {it} to {colour}",
            "turn {it} {colour}",
            "{it} should be {colour}",
            "recolour {it} in {colour}",
        ),
    ),
    "texture": (
        _texture,
        (
            "make {it} {texture}",
            "change the texture of {it} to {texture}",
            "give {it} a {texture} look",
            "{it} should be {texture}",
            "let {it} be {texture}",
            "turn the surface of {it} {texture}",
        ),
    ),
    "background": (
        _background,
        (
            "make the background {what}",
            "change the background to {what}",
            "turn the background {what}",
            "give it a {what} background",
            "the background should be {what}",
            "use a {what} background",
        ),
    ),
    "move": (
        _move,
        (
            "move {it} {where}",
            "shift {it} {where}",
            "bring {it} {where}",
            "push {it} {where}",
            "{it} should move {where}",
            "drag {it} {where}",
        ),
    ),
    "resize": (
        _resize,
        (
            "make {it} {size}",
            "{it} should be {size}",
            "change the size of {it} to {size}",
            "resize {it} to be {size}",
            "let {it} become {size}",
        ),
    ),
    "style": (
        _style,
        (
            "make it {style}",
            "make the picture {style}",
            "make the whole image {style}",
            "turn the image {style}",
            "the picture should look {style}",
            "edit the photo to be {style}",
        ),
    ),
    "keep": (
        _keep,
        (
            "keep the picture as it is",
            "do not change anything",
            "leave everything unchanged",
            "change nothing",
            "no edit",
            "keep it the same",
        ),
    ),
}
"""Family -> (what it does to a scene, its wordings)."""
PICTURE_FAMILIES = ("style", "keep", "add")


def words(duotone: bool = True) -> list[str]:
    """Every instruction text the families can build on, for making a vocabulary."""
    texts = [w.replace("{", " ").replace("}", " ") for _, wordings in FAMILIES.values() for w in wordings]
    texts += [p for style, phrases in _STYLE_PHRASES.items() for p in phrases if duotone or style != "duotone"]
    return [*texts, *SHAPES, *COLOURS, *TEXTURES, *PLACES, *SIZES, "the object", "one step up down left right"]


def _new_object(rng: Random, scene: Scene, cell: int) -> Object:
    while True:
        new = Object(
            rng.choice(SHAPES),
            rng.choice([c for c in COLOURS if c != scene.background.colour]),
            rng.choice(TEXTURES) if rng.random() < 0.3 else "plain",
            cell,
        )
        if not _has(scene, new):
            return new


def _has(scene: Scene, new: Object) -> bool:
    return any((o.shape, o.colour) == (new.shape, new.colour) for o in scene.objects)


def _refer(rng: Random, scene: Scene, it: Object, texture: bool = True) -> str:
    """A phrase that only this object of the scene answers to."""
    others = [o for o in scene.objects if o is not it]
    phrases = [f"the {it.colour} {it.shape}"] * 3
    if texture and it.texture != "plain":
        phrases.append(f"the {it.texture} {it.colour} {it.shape}")
    if all(o.shape != it.shape for o in others):
        phrases.append(f"the {it.shape}")
    if all(o.colour != it.colour for o in others):
        phrases.append(f"the {it.colour} object")
    return rng.choice(phrases)


def _article(it: Object) -> str:
    phrase = f"{it.colour} {it.shape}" if it.texture == "plain" else f"{it.texture} {it.colour} {it.shape}"
    return with_article(phrase)


def _place(cell: int) -> str:
    return f"the {PLACES[cell]}"


def _with(scene: Scene, old: Object, new: Object) -> Scene:
    return replace(scene, objects=tuple(new if o is old else o for o in scene.objects))


def _without(scene: Scene, old: Object) -> Scene:
    return replace(scene, objects=tuple(o for o in scene.objects if o is not old))
