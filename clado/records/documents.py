"""Results as JSON documents: writing, reading, and errors. Most of them contain a search space."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clado.errors import CladoError, StoreError
from clado.records.text import write_text
from clado.space import Layer, SearchSpace


def space_document(space: SearchSpace) -> dict[str, Any]:
    """A search space as plain data."""
    return {
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "operator": layer.operator,
                "macs": layer.macs,
                "channel_axis": layer.channel_axis,
                "bits": list(bits),
            }
            for layer, bits in zip(space.layers, space.bit_widths, strict=True)
        ],
        "ties": [list(tie) for tie in space.ties],
        "activation_bits": list(space.activation_widths),
        "blocks": [list(block) for block in space.custom_blocks],
    }


def space_of(document: Mapping[str, Any]) -> SearchSpace:
    """The search space of `space_document`. Raises KeyError, TypeError, ValueError or CladoError for anything else."""
    rows = [dict(row) for row in document["layers"]]
    bits = tuple(tuple(row.pop("bits")) for row in rows)
    return SearchSpace(
        tuple(Layer(**{**row, "shape": tuple(row["shape"])}) for row in rows),
        bits,
        tuple(map(tuple, document["ties"])),
        tuple(document["activation_bits"]),
        tuple(map(tuple, document["blocks"])),
    )


def write_document(path: str | Path, document: Mapping[str, Any]) -> None:
    """Writes a document completely or not at all. Infinities become null."""
    write_text(Path(path), json.dumps(_finite(document), indent=1, allow_nan=False))


def read_document(path: str | Path, file_format: str, what: str) -> dict[str, Any]:
    """The document of a file.

    Args:
        path: The file.
        file_format: What its "format" must say.
        what: What the file is and how it is made, for messages.

    Raises:
        StoreError: The file is missing, or holds something else.
    """
    try:
        document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["format"] != file_format:
            raise ValueError(f"its format is {document['format']!r}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path, error, what) from None
    return document


def unreadable(path: str | Path, error: Exception, what: str) -> StoreError:
    """The error for a file that cannot be read."""
    reason = str(error) if isinstance(error, CladoError | OSError | ValueError) else f"{type(error).__name__}: {error}"
    return StoreError(f"{path} cannot be read ({reason}); expected {what}")


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value
