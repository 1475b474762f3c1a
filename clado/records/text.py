"""Text files, Markdown tables and numbers in readable form."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

REPORT = "report.html"
"""The page of a run, in its folder."""


def write_text(path: Path, text: str) -> None:
    """Writes a file through a temporary file and a rename, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Its columns are padded, so that it is also readable as plain text."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[k]) for row in table) for k in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    """A fraction in percent with two decimals. A dash for None and NaN."""
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f}"


def size_text(num_bytes: float) -> str:
    """Bytes with three digits. kB = 10^3 bytes, MB = 10^6 bytes."""
    number, unit = (num_bytes / 1e6, "MB") if num_bytes >= 999_500 else (num_bytes / 1e3, "kB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def file_name(budget: str) -> str:
    """The name of a budget as the name of a file or a folder."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", budget)


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the ending `.weight`.

    If two of them are then equal, the whole names are used.
    """
    stems = [name.removesuffix(".weight") for name in names]
    return stems if len(set(stems)) == len(names) else list(names)
