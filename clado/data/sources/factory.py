"""A network from Python code: `package.module:function` returns a torch.nn.Module, or (torch.nn.Module, example input)."""

from typing import Any

from torch import Tensor, nn

from clado.errors import CladoError, NetworkError
from clado.plugins import imported
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
    function = imported(name, "factory", "function", NetworkError)
    if not callable(function):
        module_name, _, key = name.partition(":")
        raise NetworkError(f"factory {name!r}: {module_name} has no function {key!r}; it is a {type(function).__name__}")
    try:
        return function()
    except CladoError:
        raise
    except Exception as error:
        raise NetworkError(f"factory {name!r} raised {type(error).__name__}: {error}") from error
