"""Plug-ins: how a file in a folder becomes a name in the settings. Imports only the standard library.

A public module file of a plug-in folder is a plug-in. Its name is that of the file. `available` lists names and imports nothing.
`load` imports a plug-in when it is first used. `package.module:name` names a plug-in that lives elsewhere.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from clado.errors import CladoError, ConfigurationError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Folder:
    """A folder of plug-ins."""

    package: str
    """Dotted name of the package whose public modules are the plug-ins."""
    noun: str
    """The word for a plug-in in messages, and the name of the object in its file."""
    interface: str | None = None
    """Class of the package of which a plug-in is an object. None: the module itself is the plug-in."""


FOLDERS = {
    "sources": Folder("clado.data.sources", "source"),
    "criteria": Folder("clado.criteria", "criterion", "Criterion"),
    "quantizers": Folder("clado.quantization.quantizers", "quantizer", "Quantizer"),
    "corrections": Folder("clado.quantization.corrections", "correction", "Correction"),
    "kinds": Folder("clado.measuring.kinds", "kind", "TileKind"),
    "measurements": Folder("clado.measuring.measurements", "measurement"),
    "estimators": Folder("clado.interaction.estimators", "estimator", "Estimator"),
    "constraints": Folder("clado.choosing.constraints", "constraint", "ConstraintKind"),
    "solvers": Folder("clado.choosing.solvers", "solver", "Solver"),
    "snippets": Folder("clado.exporting.snippets", "peer", "Peer"),
    "runtimes": Folder("clado.exporting.runtimes", "runtime", "Runtime"),
    "clusters": Folder("flows.clusters", "cluster"),
}
"""Folders of plug-ins, by the names that `available` and `load` take."""


def available(folder: str) -> tuple[str, ...]:
    """Names of the plug-ins in a folder, in alphabetical order. Imports nothing.

    Args:
        folder: A key of `FOLDERS`.
    """
    package = FOLDERS[folder].package
    paths = getattr(sys.modules.get(package), "__path__", [PACKAGE.parent.joinpath(*package.split("."))])
    names = {file.stem for path in paths for file in Path(path).glob("*.py")}
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load(folder: str, name: str) -> Any:
    """The plug-in of a name: an object of the folder's interface class, or a module if the folder has no such class.

    Args:
        folder: A key of `FOLDERS`.
        name: One of `available(folder)`, or `package.module:name`.

    Raises:
        ConfigurationError: There is no such plug-in, or it is something else.
    """
    place = FOLDERS[folder]
    if ":" in name:
        plugin = imported(name, place.noun)
    elif name in available(folder):
        module = import_module(f"{place.package}.{name}")
        plugin = getattr(module, place.noun, None) if place.interface else module
    else:
        raise ConfigurationError(f"unknown {place.noun} {name!r}; {expected(folder, name)}")
    if place.interface and not isinstance(plugin, getattr(import_module(place.package), place.interface)):
        shown = f"the class {plugin.__name__}" if isinstance(plugin, type) else f"an object of type {type(plugin).__name__}"
        raise ConfigurationError(
            f"{place.noun} {name!r} is {shown}; expected an object of the class {place.package}.{place.interface}"
        )
    return plugin


def imported(name: str, noun: str, attribute: str = "name", error: type[CladoError] = ConfigurationError) -> Any:
    """The object that `package.module:attribute` names, in an installed module or in one below the working folder.

    Args:
        name: The dotted name.
        noun: The word for the object in messages.
        attribute: The word for the attribute in messages.
        error: Raised if there is no such module or attribute.
    """
    module_name, _, key = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # it stays in the path, because the imported module may import its own modules later
    try:
        module = import_module(module_name)
    except Exception as cause:
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise error(
                f"{noun} {name!r}: no module {missing!r}; expected package.module:{attribute}, installed or below {here}"
            ) from None
        text = str(cause) if isinstance(cause, ModuleNotFoundError) else f"{type(cause).__name__}: {cause}"
        raise error(f"{noun} {name!r}: importing {module_name} failed: {text}") from cause
    if not hasattr(module, key):
        names = [public for public in vars(module) if not public.startswith("_")]
        raise error(f"{noun} {name!r}: {module_name} has no {attribute} {key!r}{nearest(key, names)}")
    return getattr(module, key)


def expected(folder: str, name: str) -> str:
    """The valid names of a folder, and the one that is closest to a wrong name."""
    return f"expected one of {', '.join(available(folder))}{nearest(name, available(folder))}"


def nearest(word: str, valid: Sequence[str]) -> str:
    """' (did you mean …?)' if a valid word is close, else nothing."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
