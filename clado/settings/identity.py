"""Hashes of settings, which name what was measured under them."""

import hashlib
import json
from typing import Any


def fingerprint(document: Any) -> str:
    """SHA-256 of the canonical JSON of plain data: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
