"""What helps where a command line cannot be read: a picture in place of a command, or several where one belongs."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.core import TyperCommand, TyperGroup

from ..pictures.reading import SUFFIXES
from .common import console

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


class Command(TyperCommand):
    """A command. What is empty, as a shell gives it for a variable that is not set, is refused, not taken for what was
    not given; but for options that are empty by default."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        named = [name for option in self.params if option.default != "" for name in option.opts if name[0] == "-"]
        for option, value in zip(args, [*args[1:], None]):
            name, equals, rest = option.partition("=")
            if name in named and (rest == "" if equals else value == ""):
                ctx.fail(f"{name} is empty; give it a value, or leave it out")
        for option in self.params:
            given = [arg for arg in args if arg.partition("=")[0] in option.opts and arg[:1] == "-"]
            if len(given) > 1 and not (option.multiple or option.is_flag):
                console.print(f"{option.opts[0]} is given {len(given)} times; the last one counts")
        if args and args[0] == "" and self.params[0].name != "prompt":  # which regions may stand in for
            ctx.fail(f"{self.params[0].name} is empty; name one")
        return super().parse_args(ctx, args)


class OnePicture(Command):
    """A command of one picture. Several, as a shell's *.png gives them, are answered by what to write."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            pictures = [one for one in given if _is_picture(one)]
            if len(pictures) < 2 or "extra argument" not in error.message:
                raise
            loop = f'for each in *{Path(pictures[0]).suffix}; do varedit {ctx.info_name} "$each" "WHAT TO CHANGE"; done'
            ctx.fail(f"{', '.join(pictures[:3])}: one picture at a time; for all of a folder write: {loop}")


def _is_picture(text: str) -> bool:
    return Path(text).suffix.lower() in SUFFIXES and Path(text).is_file()
