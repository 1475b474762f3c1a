"""Checks of the arguments of `Network`: wrapped modules, and example inputs that are not images."""

from torch import Tensor, nn

from clado.errors import DataError, NetworkError


def check_model(model: object) -> None:
    """Raises NetworkError for anything but a module, and for wrappers that only run another module.

    Raises:
        NetworkError: The message says where the wrapped module is.
    """
    if not isinstance(model, nn.Module):
        raise NetworkError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    name = type(model).__name__
    if isinstance(model, nn.DataParallel) or name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise NetworkError(f"model is a {name}, which spreads another module over devices; expected that module: model.module")
    if hasattr(model, "_orig_mod"):
        raise NetworkError(f"model is the result of torch.compile ({name}); expected the module before: model._orig_mod")


def check_example(example: object) -> None:
    """Raises DataError for an example input that is not a batch of images.

    Raises:
        DataError: It is not a tensor, has too few axes, or holds integers.
    """
    if not isinstance(example, Tensor) or example.ndim < 2:
        raise DataError("example_input is not a batch of images; expected a tensor (N, C, H, W)")
    if not example.is_floating_point():
        raise DataError(
            f"example_input holds {example.dtype}; expected images of torch.float32, as (images / 255 - mean) / std gives them. "
            "Networks that read token ids or other integers are not supported"
        )
