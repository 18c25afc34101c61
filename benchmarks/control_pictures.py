"""Pictures of what every control does, by the demo model: docs/images/control_*.jpg.

python benchmarks/control_pictures.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, few, finish, parsed, parser
from varedit_core import Editor, SamplingSettings
from varedit_core.controls.auto_mask import AUTO_MASK
from varedit_core.controls.curves import PRESETS
from varedit_core.controls.registry import Controls
from varedit_core.demo import GUIDANCE, SAMPLES, SIZE, demo_files
from varedit_core.pictures.canvas import crop, crop_around, extend, stitch
from varedit_core.pictures.composite import Region
from varedit_core.pictures.contact_sheet import Row, contact_sheet
from varedit_core.pictures.images import load_image

SCENE, CAT = SAMPLES / "scene.png", SAMPLES / "cat.jpg"
STAR, SQUARE, SEPIA = "recolour the black star in purple", "in the bottom centre, add a pink square", "make it sepia"
PLAIN = SamplingSettings(guidance=GUIDANCE)
LIVELY = SamplingSettings(guidance=GUIDANCE, temperature=1.0)


def box(picture: Image.Image, share: tuple[float, float, float, float], ellipse: bool = False) -> Image.Image:
    mask = Image.new("L", picture.size)
    corners = [part * side for part, side in zip(share, picture.size * 2)]
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if ellipse else draw.rectangle)(corners, fill=255)
    return mask


class Pictures:
    def __init__(self, options: argparse.Namespace) -> None:
        self.editor, self.options, self.saved = Editor.load(*demo_files()), options, {}
        self.scene, self.cat = (load_image(file).rgb for file in (SCENE, CAT))

    def run(self, picture, words=(), settings=PLAIN, **more):
        return self.editor.run(picture, words, size=SIZE, settings=settings, **more)

    def sheet(self, name: str, columns: list[str], *rows: tuple[str, list[Image.Image]], cell: int = 144) -> None:
        sheet = contact_sheet([Row(*row) for row in rows], columns, cell)
        path = self.options.folder / f"control_{name}.jpg"
        sheet.save(path, quality=88)
        print(path, sheet.size, flush=True)
        self.saved[path.name] = sheet.size

    def mask(self) -> None:
        mask = box(self.cat, (0.3, 0.2, 0.75, 0.75), ellipse=True)
        free, held, faded = (
            self.run(self.cat, SEPIA, **more).pictures[0] for more in ({}, {"mask": mask}, {"mask": mask, "seam": 24})
        )
        self.sheet(
            "mask", ["source", "mask", "no mask", "mask", "mask, seam 24"], (SEPIA, [self.cat, mask, free, held, faded])
        )

    def dials(self) -> None:
        for name, values in (
            ("strength", (0.0, 0.25, 0.5, 0.75, 1.0)), ("preserve", (0.0, 0.25, 0.5, 0.75, 1.0)),
            ("source_attention", (1.0, 0.5, 0.25, 0.1, 0.0)),
        ):  # fmt: skip
            rows, values = [], few(values, self.options, 1)
            for picture, words in few(((self.scene, STAR), (self.cat, SEPIA)), self.options, 1):
                shown = [self.run(picture, words, controls=Controls(**{name: value})).pictures[0] for value in values]
                rows.append((words, [picture, *shown]))
            self.sheet(name, ["source", *(f"{value:g}" for value in values)], *rows)

    def auto_mask(self) -> None:
        free = self.run(self.scene, SQUARE, explain=True)
        held = self.run(self.scene, SQUARE, controls=Controls(auto_mask=AUTO_MASK))
        columns = ["source", "free edit", "what changed", "certainty", "mask it found", "with it"]
        shown = [free.pictures[0], free.changes[0], free.certainty[0], held.masks[0], held.pictures[0]]
        self.sheet("auto_mask", columns, (SQUARE, [self.scene, *shown]))

    def tokens(self) -> None:
        whole = self.run(self.scene, STAR, LIVELY)
        draft = whole.tokens.first(4)
        (shown,) = self.editor.decode(draft.total(), [self.editor.fit(self.scene, SIZE)])
        finished = self.run(self.scene, STAR, LIVELY, given=draft).pictures[0]
        again = self.run(self.scene, SQUARE, LIVELY, given=draft, variations=2).pictures
        columns = ["source", "whole edit", "four scales", "finished", "other words", "and seed"]
        self.sheet("tokens", columns, (STAR, [self.scene, whole.pictures[0], shown, finished, *again]))

    def chain(self) -> None:
        words = few((STAR, SQUARE, "remove the green diamond", "make the red hexagon blue"), self.options, 1)
        edited, shown = self.scene, [self.scene]
        for one in words:
            edited = self.run(edited, one, controls=Controls(auto_mask=AUTO_MASK))
            shown.append(edited.pictures[0])
        columns = few(("purple star", "pink square", "no diamond", "blue hexagon"), self.options, 1)
        self.sheet("chain", ["source", *columns], ("; ".join(words), shown))

    def regions(self) -> None:
        upper, lower = box(self.scene, (0.5, 0, 1, 0.4)), box(self.scene, (0, 0.6, 1, 1))
        regions = [Region(STAR, upper), Region(SQUARE, lower)]
        both = self.run(self.scene, regions=regions).pictures[0]
        self.sheet(
            "regions", ["source", "first", "second", "one run"], (f"{STAR}; {SQUARE}", [self.scene, upper, lower, both])
        )

    def presets(self) -> None:
        rows = []
        for name in few(PRESETS, self.options, 1):
            shown = self.run(
                self.scene, SQUARE, SamplingSettings(guidance=GUIDANCE).preset(name), variations=4
            ).pictures
            rows.append((name, [self.scene, *shown]))
        self.sheet("presets", ["source", "seed 0", "1", "2", "3"], *rows)

    def best_of(self) -> None:
        hot, rows = SamplingSettings(guidance=GUIDANCE, temperature=3.0), []
        for name in few(("none", "likelihood", "near", "far"), self.options, 1):
            controls = Controls() if name == "none" else Controls(best_of=8, best_at=4, score=name)
            seeds = [
                SamplingSettings(hot.guidance, hot.temperature, hot.top_p, seed)
                for seed in few((0, 100, 200), self.options, 1)
            ]
            rows.append(
                (
                    f"best of 8 by {name}",
                    [self.run(self.scene, SQUARE, s, controls=controls).pictures[0] for s in seeds],
                )
            )
        self.sheet("best_of", few(("seed 0", "100", "200"), self.options, 1), *rows)

    def canvas(self) -> None:
        large = self.scene.resize((768, 768), Image.Resampling.LANCZOS)
        mask = box(large, (0.68, 0.02, 1, 0.3))
        place = crop_around(large.size, mask)
        part, inner = crop(load_image(large), place)
        edited = self.run(part, STAR, mask=inner).pictures[0]
        whole = stitch(load_image(large), edited, place)
        wide, fresh = extend(load_image(self.scene), (96, 0, 0, 96), fill="mirror")
        grown = self.run(wide, SQUARE, mask=fresh).pictures[0]
        columns = ["source", "mask", "crop", "edited crop", "stitched"]
        self.sheet("crop", columns, (STAR, [large, mask, part.rgb, edited, whole]))
        self.sheet("extend", ["source", "extended", "its mask", "edit"], (SQUARE, [self.scene, wide.rgb, fresh, grown]))


def main() -> None:
    names = [name for name, part in vars(Pictures).items() if not name.startswith("_") and name not in ("run", "sheet")]
    known = parser(__doc__)
    known.add_argument("--folder", type=Path, default=ROOT / "docs" / "images")
    known.add_argument("--only", nargs="*", default=names, choices=names, metavar="PART")
    options = parsed(known)
    pictures = Pictures(options)
    for name in options.only:
        getattr(pictures, name)()
    finish({"pictures": pictures.saved}, options.save)


if __name__ == "__main__":
    main()
