"""Settings from YAML, from overrides and from the command line. Messages about errors say what to write instead."""

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from clado.errors import ConfigurationError, StoreError
from clado.plugins import nearest
from clado.settings.redaction import redact
from clado.settings.schema import ConstraintSettings, RunConfig
from clado.settings.tracking import TRACKING_VARIABLE, database_of

log = logging.getLogger(__name__)
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML that refuses equal keys instead of silently using the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = [pair for pair in node.value if pair[0].tag != MERGE]  # keys merged with << may be repeated
        keys = [self.construct_object(key, deep=True) for key, _ in pairs]
        for k, key in enumerate(keys):
            if key in keys[:k]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", pairs[k][0].start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file, with overrides of the form `section.key=value` (values in YAML)."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ConfigurationError(f"{path} {what}; expected a YAML file, such as `clado init` writes")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path} holds no settings; expected YAML such as `clado init` writes, beginning with network:")
    # If all keys of a section are commented out, it has the defaults.
    document = {key: value for key, value in document.items() if value is not None}
    for override in overrides:
        _apply(document, override)
    return parse_config(document, str(path))


def load_run_config(folder: Path, uri: str | None = None) -> RunConfig:
    """The configuration of a run's folder, which may have been moved.

    The URI of MLflow is the one given here, else MLFLOW_TRACKING_URI, else the one in the run's settings. If this is an SQLite
    file whose folder does not exist, the default is used, with a warning.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise StoreError(
            f"{folder} is not the folder of a run: it has no config.yaml; expected a folder that `clado run` has made under runs/"
        )
    overrides = [f"folder={json.dumps(str(folder), ensure_ascii=False)}"]
    settings = load_config(file, overrides)
    database, chosen = database_of(settings.tracking.uri), uri or os.environ.get(TRACKING_VARIABLE)
    gone = database is not None and not database.parent.is_dir()
    if not chosen and not gone:
        return settings
    config = load_config(file, [*overrides, f"tracking.uri={json.dumps(uri or '')}"])
    if not chosen:
        log.warning(
            "%s does not exist any more; MLflow's records of %s go to %s", settings.tracking.uri, folder, config.tracking.uri
        )
    return config


def parse_config(document: dict[str, Any], whence: str = "configuration") -> RunConfig:
    """A validated configuration from plain data. All errors are in one ConfigurationError, one line each."""
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        lines = [_explain(fault) for fault in error.errors()]
        raise ConfigurationError(redact(f"{whence}: " + "\n  ".join(lines))) from None


def parse_limit(text: str) -> ConstraintSettings:
    """A constraint from the command line: KIND=BOUND or KIND=BOUND:CSV."""
    name, _, rest = text.partition("=")
    bound, _, path = rest.partition(":")
    expected = "expected KIND=BOUND or KIND=BOUND:CSV, such as bops=4e9 or latency=0.002:times.csv"
    try:
        return ConstraintSettings(kind=name, bound=float(bound), path=Path(path) if path else None)
    except ValidationError as error:
        raise ConfigurationError(f"--limit {text!r}: {'; '.join(map(_explain, error.errors()))}; {expected}") from None
    except ValueError:
        raise ConfigurationError(f"--limit {text!r} has a bound that is not a number; {expected}") from None


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"override {override!r} is not KEY=VALUE; expected for example data.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the value of override {override!r} is not YAML: {error}") from None
    *path, last = key.split(".")
    section: Any = document
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigurationError(f"override {override!r}: {name!r} is a value, not a section")
    section[last] = value


def _explain(fault: Any) -> str:
    *path, key = fault["loc"] or ("",)
    where, value = ".".join(str(part) for part in fault["loc"]), fault["input"]
    plain = isinstance(value, str | int | float | bool | list | tuple)
    shown = repr(value) if plain else "empty" if value is None else type(value).__name__
    match fault["type"]:
        case "extra_forbidden":
            valid = _keys_at(path)
            said = f"unknown key {where!r}{nearest(str(key), valid)}; valid keys are {', '.join(valid)}"
        case "missing" if isinstance(key, int):
            parent = ".".join(str(part) for part in path)
            said = f"{parent} is too short; expected {key + 1} values or more, such as [3, 224, 224]"
        case "missing":
            example = "; expected for example network: {source: zoo, name: resnet20_fashion_mnist}"
            said = f"{where!r} is missing{example if 'network' in (key, *path) else ', and has no default'}"
        case "literal_error":
            valid = tuple(re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
            said = f"{where}: unknown name {shown}; expected one of {', '.join(valid)}{nearest(str(value), valid)}"
        case "tuple_type":
            said = f"{where} is {shown}; expected a list, such as [{value if plain else 2}]"
        case "model_type" | "model_attributes_type":
            said = f"{where} is {shown}; expected a section with keys of {', '.join(_keys_at(fault['loc']))}"
        case "value_error":
            message = str(fault["msg"]).removeprefix("Value error, ")
            said = message if not where or message.startswith(f"{where} ") else f"{where}: {message}"
        case "float_type" if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\d+", value):
            said = f"{where} is the text {shown} in YAML; expected a number with a point and a sign, such as {float(value):.1e}"
        case _:
            said = f"{where}: {fault['msg']}, got {shown}"
    return said


def _keys_at(path: Sequence[Any]) -> tuple[str, ...]:
    model: type[BaseModel] = RunConfig
    for name in (part for part in path if not isinstance(part, int)):  # an integer is an index of a list
        annotation = model.model_fields[str(name)].annotation if str(name) in model.model_fields else None
        inner = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type) and issubclass(part, BaseModel)]
        if not inner:
            return ()
        model = inner[0]
    return tuple(field.alias or name for name, field in model.model_fields.items())
