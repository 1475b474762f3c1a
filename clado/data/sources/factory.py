"""A network from Python code: `package.module:function` returns a torch.nn.Module, or (torch.nn.Module, example input)."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clado.errors import CladoError, NetworkError
from clado.plugins import nearest
from clado.settings.schema import NetworkSettings


def load_network(settings: NetworkSettings) -> tuple[nn.Module, Tensor | None]:
    """What the function returns when called without arguments; modules of the current directory can be named too."""
    made = _call(settings.name)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (example is None or isinstance(example, Tensor)):
        shown = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
        raise NetworkError(
            f"{settings.name} returned {shown}; expected a torch.nn.Module, or (torch.nn.Module, example input tensor)"
        )
    return model, example


def _call(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # it stays: the network may import its own modules when it runs
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise NetworkError(
                f"factory {name!r}: no module {error.name!r}; expected package.module:function, installed or below {here}"
            ) from None
        raise NetworkError(f"factory {name!r}: importing {module_name} failed: {error}") from error
    except Exception as error:
        raise NetworkError(f"factory {name!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        valid = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise NetworkError(f"factory {name!r}: {module_name} has no function {function_name!r}{nearest(function_name, valid)}")
    try:
        return function()
    except CladoError:
        raise
    except Exception as error:
        raise NetworkError(f"factory {name!r} raised {type(error).__name__}: {error}") from error
