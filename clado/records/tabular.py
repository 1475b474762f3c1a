"""How results are shown: one line, a small HTML table in notebooks, a pandas frame."""

from collections.abc import Sequence
from html import escape
from importlib import import_module
from typing import Any

from clado.errors import ConfigurationError

MOST_ROWS = 40
"""Rows that a notebook shows of a table."""


class Tabular:
    """A result with one line of summary and rows."""

    def summary(self) -> str:
        """What the result is, in one line."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each row, all with the same keys."""
        raise NotImplementedError

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
            ConfigurationError: pandas is not installed.
        """
        return pandas().DataFrame(self.rows())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def _repr_html_(self) -> str:
        """HTML for notebooks."""
        return html_table(self.summary(), self.rows())


def pandas() -> Any:
    """The module pandas. clado itself does not need it."""
    try:
        return import_module("pandas")
    except ImportError:
        raise ConfigurationError(
            "to_frame() needs pandas, which is not installed; expected pip install pandas, or rows(), which gives dictionaries"
        ) from None


def html_table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A title and a table. If there are many rows, those in the middle are left out."""
    header = "".join(f"<th>{escape(str(key).replace('_', ' '))}</th>" for key in (rows[0] if rows else ()))
    half = MOST_ROWS // 2
    shown = list(rows) if len(rows) <= MOST_ROWS else [*rows[:half], None, *rows[-half:]]
    lines = []
    for row in shown:
        if row is None:
            lines.append(f'<tr><td colspan="{len(rows[0])}">… {len(rows) - 2 * half} more rows: to_frame() has them</td></tr>')
        else:
            lines.append("<tr>" + "".join(f"<td>{escape(_text(value))}</td>" for value in row.values()) + "</tr>")
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table>" if rows else ""
    return f"<div><p>{escape(title)}</p>{table}</div>"


def _text(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return str(value)
