"""Types of settings that several sections share, and the base of every section."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from clado.bits import FLOAT, check_bits, check_candidates
from clado.errors import ConfigurationError
from clado.plugins import available, expected


class Settings(BaseModel):
    """Base of every section. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)


DOTTED = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""`package.module:name`."""


def dotted(what: str) -> AfterValidator:
    """Accepts `package.module:name`, which is looked up when the run is opened."""

    def check(name: str) -> str:
        if not re.fullmatch(DOTTED, name):
            raise ValueError(f"{name!r} is not such a name; expected package.module:name {what}")
        return name

    return AfterValidator(check)


def one_of(folder: str) -> AfterValidator:
    """Accepts the names of a plug-in folder. A name `package.module:name` is looked up when the run is opened."""

    def check(name: str) -> str:
        if re.fullmatch(DOTTED, name) and folder != "clusters":
            return name
        if name not in available(folder):
            other = ", or package.module:name" if folder != "clusters" else ""
            raise ValueError(f"unknown name {name!r}; {expected(folder, name)}{other}")
        return name

    return AfterValidator(check)


def _check_bits(bits: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return check_bits(bits)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def _check_candidate(candidate: object) -> int | str:
    if candidate == FLOAT or (isinstance(candidate, int) and not isinstance(candidate, bool)):
        return candidate
    raise ValueError(f"{candidate!r} is no bit-width; expected an integer, or {FLOAT}")


def _check_candidates(candidates: tuple[int | str, ...]) -> tuple[int | str, ...]:
    try:
        return tuple(FLOAT if bits is None else bits for bits in check_candidates(candidates))
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


Integer = Annotated[int, Field(strict=True)]  # pydantic would convert true to 1, and "2" to 2
Count = Annotated[int, Field(strict=True, ge=1)]
Bits = Annotated[tuple[Annotated[int | str, BeforeValidator(_check_candidate)], ...], AfterValidator(_check_candidates)]
BitsOrNone = Annotated[tuple[Integer, ...], AfterValidator(lambda bits: _check_bits(bits) if bits else bits)]
Positive = Annotated[float, Field(strict=True, gt=0)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
