"""Small functions of tensors: check logits and weights, leave inference mode, keep a layout."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clado.errors import NetworkError


def logits_of(value: Any) -> Tensor:
    """The outputs of a network. Raises NetworkError unless they are one tensor (images, classes)."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise NetworkError(
            f"the network returns {getattr(value, 'shape', type(value).__name__)}; expected logits (images, classes)"
        )
    return value


def outside_inference(value: Any) -> Any:
    """A tensor without gradient that autograd can save. Other values are returned unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.is_inference() else value.detach()


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory format of another of its shape."""
    nhwc = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def unfit(state: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold a NaN or an infinity, except masks of only 0 and −∞."""
    return [
        name
        for name, tensor in state.items()
        if not bool(torch.isfinite(tensor).all()) and not bool(((tensor == 0) | (tensor == -torch.inf)).all())
    ]
