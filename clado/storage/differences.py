"""The differences of two plain documents in words: the settings of a store, and those of a run."""

from collections.abc import Mapping, Sequence
from typing import Any


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One line for each leaf in which two plain documents differ. Rows with names, such as layers, are compared by name."""
    if all(value is None or isinstance(value, Mapping) for value in (old, new)):
        before, after, lines = old or {}, new or {}, []
        for key in sorted({*before, *after}):
            lines += differences(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
        return lines
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return [] if list(old) == list(new) else _differences_of_lists(list(old), list(new), where)
    return [] if old == new else [f"{where}: the store has {old!r}, this run {new!r}"]


def _differences_of_lists(old: list[Any], new: list[Any], where: str) -> list[str]:
    if _have_names(old) and _have_names(new):
        return _differences_by_name(old, new, where)
    if all(isinstance(entry, int | str) for entry in (*old, *new)):
        return [f"{where}: the store has {old!r}, this run {new!r}"]
    if len(old) == len(new):
        first = next(k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return [f"{where}[{first}]: the store has {old[first]!r}, this run {new[first]!r}"]
    return [f"{where}: the store has {len(old)} entries, this run {len(new)}"]


def _have_names(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, Mapping) and "name" in row for row in rows)


def _differences_by_name(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """A line for the rows that only one has, and a line for each difference with the names of all rows that have it."""
    before, after = ({row["name"]: row for row in rows} for rows in (old, new))
    lines = []
    if only := [name for name in before if name not in after]:
        lines.append(f"{where}: only the store has {_listed(only)}")
    if only := [name for name in after if name not in before]:
        lines.append(f"{where}: only this run has {_listed(only)}")
    names_by_change: dict[str, list[str]] = {}
    for name in before:
        for line in differences(before[name], after[name]) if name in after else []:
            names_by_change.setdefault(line, []).append(name)
    lines += [f"{line} ({where}: {_listed(names)})" for line, names in names_by_change.items()]
    return lines or [f"{where}: the store has them in another order than this run"]


def _listed(names: Sequence[str]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
