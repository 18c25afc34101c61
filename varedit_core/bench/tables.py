"""The tables of `varedit bench`, printed from the rows that are kept as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .ceilings import Ceilings
from .measure import PHASES


def print_case(row: dict) -> None:
    """Every scale of a case: its time beside its arithmetic and the least time that this takes."""
    seconds = row["seconds"]
    title = f"{row['name']}: {seconds['median']:.3f} s ({seconds['min']:.3f}-{seconds['max']:.3f})"
    table = _table(title, "scale", "tokens", "ms", "TFLOP", "least ms")
    for index, scale in enumerate(row["scales"]):
        height, width = scale["grid"]
        name = f"{height}x{width}" if index or row["kind"] == "reroll" else f"source, {height}x{width}"
        table.add_row(
            name, str(height * width), _ms(scale["seconds"]), f"{scale['tflop']:.3g}", _ms(scale["floor_seconds"])
        )
    _print(table)


def print_summary(rows: Sequence[dict], ceilings: Ceilings) -> None:
    """Phases of every case, and the loop against what the machine can do."""
    phases = _table("phases, seconds", "case", "whole edit", *PHASES, "warm-ups more", "peak GiB", "published", "ratio")
    loops = _table("the loop against the machine", "case", "s", "least s", "TFLOP", "TFLOP/s", "of the product's")
    for row in rows:
        other = row.get("published")
        phases.add_row(
            row["name"], _spread(row["seconds"]), *(_seconds(row["phases"].get(name)) for name in PHASES),
            _seconds(row["warmup_extra_seconds"]), _number(row["peak_gib"], 1),
            _spread(other["seconds"]) if other else "-", f"{other['ratio']:.2f}" if other else "-",
        )  # fmt: skip
        loop, tflop = row["phases"]["loop"], sum(row["tflop"].values())
        loops.add_row(
            row["name"], _seconds(loop), _seconds(row["floor_seconds"]), f"{tflop:.3g}",
            "-" if row["share"] is None else f"{tflop / loop:.3g}",
            "-" if row["share"] is None else f"{row['share']:.0%}",
        )  # fmt: skip
    _print(phases)
    _print(loops)
    machine = _table("the machine", "product TFLOP/s", "8-bit TFLOP/s", "copy GB/s", "host to device GB/s")
    machine.add_row(
        f"{ceilings.matmul_tflops:.4g} ({ceilings.dtype})", _number(ceilings.fp8_tflops, 0),
        _number(ceilings.copy_gbs, 0), _number(ceilings.host_to_device_gbs, 1),
    )  # fmt: skip
    _print(machine)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("case", "scale") else "right")
    return table


def _print(table: Table) -> None:
    Console(width=max(Console().width, 140), markup=False).print(table)


def _spread(seconds: dict) -> str:
    return f"{seconds['median']:.3f} ({seconds['min']:.3f}-{seconds['max']:.3f})"


def _seconds(value: float | None) -> str:
    return _number(value, 3)


def _ms(value: float) -> str:
    return f"{value * 1e3:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
