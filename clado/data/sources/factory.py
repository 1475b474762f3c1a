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
    """The network and the example input that the function returns.

    It is called without arguments. It may be in a module of the current directory.
    """
    result = _call(settings.name)
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module) or not (example is None or isinstance(example, Tensor)):
        type_names = (
            f"({', '.join(type(element).__name__ for element in result)})" if isinstance(result, tuple) else type(result).__name__
        )
        raise NetworkError(
            f"{settings.name} returned {type_names}; expected a torch.nn.Module, or (torch.nn.Module, example input tensor)"
        )
    return model, example


def _call(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)  # it stays: the network may import its own modules when it runs
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise NetworkError(
                f"factory {name!r}: no module {error.name!r}; expected package.module:function, installed or below {directory}"
            ) from None
        raise NetworkError(f"factory {name!r}: importing {module_name} failed: {error}") from error
    except Exception as error:
        raise NetworkError(f"factory {name!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise NetworkError(f"factory {name!r}: {module_name} has no function {function_name!r}{nearest(function_name, names)}")
    try:
        return function()
    except CladoError:
        raise
    except Exception as error:
        raise NetworkError(f"factory {name!r} raised {type(error).__name__}: {error}") from error
