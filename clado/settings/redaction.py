"""Credentials in URIs, and how they are kept out of everything that is written."""

import re
from typing import Annotated

from pydantic import PlainSerializer

HIDDEN = "***"  # in place of a credential
_USER = re.compile(r"(?<=://)(?:[^/\s:@]*:\S*|[^/\s:@]+)@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:pass|pwd|token|secret|key|sig|credential|auth)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with the user, the password and the secret query values of any URI in it replaced by `***`."""
    return _SECRET.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


# everything that writes settings (config.yaml, MLflow, Prefect) writes JSON, which has no credentials
Uri = Annotated[str, PlainSerializer(redact, when_used="json")]
