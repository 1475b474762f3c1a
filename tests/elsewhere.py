"""A device that only refuses: tensors that compute on the CPU and say that they are elsewhere.

As on a GPU, an operator that is given tensors of both places raises, and so does NumPy. So what would fail on a GPU fails in
tests that have none. The device `lazy` is one that torch knows by name in every build, and that nothing else here uses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from clado.network.network import Network

ELSEWHERE = torch.device("lazy:0")
# operators that take tensors of two places on a GPU as well
_CROSSING = {"aten.copy_.default", "aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default"}


class Reads:
    """How many times numbers were read back since `elsewhere` was entered: a GPU is waited for each time."""

    count = 0


class Elsewhere(Tensor):
    """Wraps the tensor of the CPU that it stands for."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        wrapped: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        wrapped.inner = inner
        return wrapped

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        """Numbers may be read one by one, as on a GPU."""
        Reads.count += 1
        return self.inner.tolist()

    def data_ptr(self) -> int:
        """Tied weights are known by their address."""
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


class _Placing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


_MADE_HERE = torch.tensor


def _tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
    return _MADE_HERE(data, **settings).to(device or "cpu")


@contextmanager
def elsewhere() -> Iterator[None]:
    """While it lasts, `.to(ELSEWHERE)` and `device=ELSEWHERE` are understood.

    Inference mode is no_grad meanwhile: torch makes no views of wrapped tensors in it.
    """
    with (
        patch.object(torch.inference_mode, "__enter__", lambda self: None),
        patch.object(torch.inference_mode, "__exit__", lambda self, *error: None),
        patch.object(torch, "tensor", _tensor),
        torch.no_grad(),
        _Placing(),
    ):
        Reads.count = 0
        yield


def _dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_elsewhere = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    here = any(not isinstance(tensor, Elsewhere) and tensor.ndim for tensor in tensors)  # single numbers go anywhere
    if is_elsewhere and here and str(func) not in _CROSSING:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found two")
    if is_elsewhere and (kwargs.get("device") is not None or str(func) == "aten._local_scalar_dense.default"):
        Reads.count += 1
    if kwargs.get("device") is not None:
        is_elsewhere = torch.device(kwargs["device"]) == ELSEWHERE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if any(value.alias_info is not None and value.alias_info.is_write for value in func._schema.returns):
        return args[0]  # in place
    return tree_map(lambda x: Elsewhere(x) if is_elsewhere and isinstance(x, Tensor) else x, result)


def moved(network: Network) -> Network:
    """The network with everything it computes with elsewhere."""
    graph, other, moved_tensors = network.engine, network.updated({}), dict[int, Tensor]()

    def move(value: Any) -> Any:
        return moved_tensors.setdefault(value.data_ptr(), value.to(ELSEWHERE)) if isinstance(value, Tensor) else value

    other.engine = replace(graph, constants={slot: move(value) for slot, value in graph.constants.items()})  # type: ignore[type-var,attr-defined]
    other.weights = other.engine.weights
    other.example = move(network.example)
    return other
