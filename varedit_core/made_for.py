"""What weights were made for, as far as the name of their file says: a size; the demo model's guidance, too."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from . import demo
from .defaults import SIZE, SIZES
from .sampling.settings import DEFAULT_SETTINGS, SamplingSettings
from .tokenizer.schedule import AREAS, Schedule

_SIDE = re.compile(rf"(?<!\d)({'|'.join(SIZES)})(?!\d)")


@dataclass(frozen=True)
class MadeFor:
    """side: of a square in pixels, a key of SIZES, "" where the name tells none. guidance: None likewise."""

    name: str = ""
    side: str = ""
    guidance: float | None = None

    @classmethod
    def of(cls, path: str | Path | None) -> MadeFor:
        """What the name of a transformer's file says. None: the demo model's."""
        name = Path(demo.FILES[0] if path is None else path).name
        if name.startswith(Path(demo.FILES[0]).stem):
            return cls(name, demo.SIDE, demo.GUIDANCE)
        side = _SIDE.search(Path(name).stem)
        return cls(name, side[1] if side else "")

    @property
    def size(self) -> str:
        """The named size to edit at, a key of AREAS."""
        return SIZES[self.side] if self.side else SIZE

    @property
    def settings(self) -> SamplingSettings:
        """How to draw where nothing else is said."""
        return DEFAULT_SETTINGS if self.guidance is None else replace(DEFAULT_SETTINGS, guidance=self.guidance)

    def doubt(self, schedule: Schedule) -> str | None:
        """A sentence where an edit runs at another size."""
        if self.side and len(schedule) != AREAS[self.size]:
            return f"{self.name} is made for {self.side} pixels, and this edit runs at another size; choose {self.side}"
        return None

    def doubt_default(self, settings: SamplingSettings) -> str | None:
        """A sentence where an edit has the general default of a setting that weights have one of their own for."""
        if self.guidance is not None and settings.guidance == DEFAULT_SETTINGS.guidance:
            return f"{self.name} edits best at a guidance of {self.guidance:g}; {settings.guidance:g} is for others"
        return None


UNKNOWN = MadeFor()
