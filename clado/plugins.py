"""Names of plug-ins: a public module file in one of the package's folders is a name. Imports nothing but the standard library."""

import difflib
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
FOLDERS = {
    "quantizers": "quantization/quantizers",
    "corrections": "quantization/corrections",
    "kinds": "measuring/kinds",
    "measurements": "measuring/measurements",
    "estimators": "interaction/estimators",
    "constraints": "choosing/constraints",
    "solvers": "choosing/solvers",
}
"""Folders of plug-ins, by their name."""


def available(folder: str) -> tuple[str, ...]:
    """Names of the plug-ins in one of the package's folders: its public module files. A new file is a new name."""
    return tuple(sorted(file.stem for file in (PACKAGE / FOLDERS[folder]).glob("*.py") if not file.stem.startswith("_")))


def nearest(word: str, valid: Sequence[str]) -> str:
    """' (did you mean …?)' where a valid word is close, else nothing."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
