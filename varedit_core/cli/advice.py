"""What helps where a command line cannot be read: a picture in place of a command, or several where one belongs."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.core import TyperCommand, TyperGroup

from ..pictures.reading import SUFFIXES

UsageError = typer.BadParameter.__base__
"""Of click, or of the copy of it that newer typer holds."""


class Commands(TyperGroup):
    """The commands. One that is none, but the name of a picture, is answered by what to write."""

    def resolve_command(self, ctx: typer.Context, args: list[str]):
        try:
            return super().resolve_command(ctx, args)
        except UsageError:
            if not _is_picture(args[0]):
                raise
            ctx.fail(f'{args[0]!r} is no command; to edit a picture write: varedit edit PICTURE "WHAT TO CHANGE"')


class OnePicture(TyperCommand):
    """A command of one picture. Several, as a shell's *.png gives them, are answered by what to write."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            pictures = [one for one in given if _is_picture(one)]
            if len(pictures) < 2 or "extra argument" not in error.message:
                raise
            loop = f'for each in *.png; do varedit {ctx.info_name} "$each" "WHAT TO CHANGE"; done'
            ctx.fail(f"{', '.join(pictures[:3])}: one picture at a time; for all of a folder write: {loop}")


def _is_picture(text: str) -> bool:
    return Path(text).suffix.lower() in SUFFIXES and Path(text).is_file()
